"""What gateway and agent say to each other: lines of JSON, checked field by field at both ends.

Gateway: `Hello` first, then `Set` and `Beat`. Agent: `Found` or `Refused` first, then readings and `Done`.
Knows nothing of what follows from them.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from throttllem.gpu.device import Reading, Switch

PROTOCOL = 1
LINE_BYTES = 1 << 16
"""The longest message."""
CLOSE_S = 1.0

TEXT_CHARACTERS = 2000
_Mhz = Annotated[int, Field(ge=0, le=100_000)]
_Text = Annotated[str, Field(max_length=TEXT_CHARACTERS)]
_Finite = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]


class MessageError(ValueError):
    """A line that is no message of this protocol."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Hello(_Message):
    """The GPUs to take, the clocks that will be decided (ascending), and how long the agent waits for a beat."""

    kind: Literal["hello"] = "hello"
    protocol: int
    version: _Text
    gpus: Annotated[list[_Text], Field(min_length=1, max_length=64)]
    mode: Literal["on", "dry-run", "off"]
    clocks_mhz: Annotated[list[_Mhz], Field(min_length=1, max_length=4096)]
    ttl_s: Annotated[float, Field(ge=0.2, le=60)]


class Set(_Message):
    """Set a clock; None: restore what it was before."""

    kind: Literal["set"] = "set"
    number: Annotated[int, Field(ge=0)]
    mhz: _Mhz | None


class Beat(_Message):
    """The gateway is there; its engine worked for so long since the last beat."""

    kind: Literal["beat"] = "beat"
    worked_s: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = 0.0


class Found(_Message):
    """The GPUs are taken."""

    kind: Literal["found"] = "found"
    version: _Text
    uuids: Annotated[list[_Text], Field(min_length=1, max_length=64)]
    ladder_mhz: Annotated[list[_Mhz], Field(max_length=4096)]


class Refused(_Message):
    """They are not, or no longer: why, and the connection ends."""

    kind: Literal["refused"] = "refused"
    why: _Text


class Done(_Message):
    """A `Set` was carried out: the clock to plan with."""

    kind: Literal["done"] = "done"
    number: Annotated[int, Field(ge=0)]
    mhz: _Mhz | None


class Read(_Message):
    """A reading; `trouble` in its place: the GPUs cannot be read. The fields are those of `gpu.device.Reading`."""

    kind: Literal["read"] = "read"
    clock_mhz: _Mhz | None = None
    watts: _Finite = 0.0
    energy_j: _Finite = 0.0
    dry_run_mhz: _Mhz | None = None
    stands_for_mhz: _Mhz | None = None
    limit_mhz: _Mhz | None = None
    held: _Text | None = None
    trouble: _Text | None = None
    counter_trouble: _Text | None = None
    misplaced: _Text | None = None
    switch_number: Annotated[int, Field(ge=0)] = 0
    switch_mhz: _Mhz | None = None
    switch_s: Annotated[float, Field(ge=0, le=60, allow_inf_nan=False)] | None = None
    unreadable: _Text | None = None

    @classmethod
    def of(cls, reading: Reading, switch_number: int) -> Read:
        """A reading; `switch_number` counts the switches that were measured."""
        fields = asdict(reading)
        for name in ("held", "trouble", "counter_trouble", "misplaced"):
            fields[name] = fields[name] and shortened(fields[name])
        switch = fields.pop("switch")
        if switch is not None:
            fields |= {"switch_mhz": switch["mhz"], "switch_s": switch["seconds"]}
        return cls(**fields, switch_number=switch_number)

    def reading(self, switch: Switch | None, *, energy_j: float) -> Reading:
        """The same as the gateway's; `switch` is the last that was measured."""
        fields = self.model_dump(exclude={"kind", "switch_number", "switch_mhz", "switch_s", "unreadable", "energy_j"})
        return Reading(**fields, energy_j=energy_j, switch=switch)


FromGateway = Hello | Set | Beat
FromAgent = Found | Refused | Done | Read
_FROM_GATEWAY: TypeAdapter[FromGateway] = TypeAdapter(Annotated[FromGateway, Field(discriminator="kind")])
_FROM_AGENT: TypeAdapter[FromAgent] = TypeAdapter(Annotated[FromAgent, Field(discriminator="kind")])


def shortened(text: str) -> str:
    """A text of any length as far as a message holds it."""
    return text[:TEXT_CHARACTERS]


def line(message: FromGateway | FromAgent) -> bytes:
    """A message as it is sent."""
    return json.dumps(message.model_dump(), separators=(",", ":")).encode() + b"\n"


def from_gateway(text: bytes) -> FromGateway:
    """A message of a gateway. Raises MessageError."""
    try:
        return _FROM_GATEWAY.validate_json(text)
    except ValidationError as error:
        raise MessageError(_why(error)) from None


def from_agent(text: bytes) -> FromAgent:
    """A message of an agent. Raises MessageError."""
    try:
        return _FROM_AGENT.validate_json(text)
    except ValidationError as error:
        raise MessageError(_why(error)) from None


async def closed(writer: asyncio.StreamWriter) -> None:
    """Close a connection, at the latest after `CLOSE_S`, whatever the other end does."""
    writer.close()
    try:
        async with asyncio.timeout(CLOSE_S):
            await writer.wait_closed()
    except OSError:
        writer.transport.abort()


def _why(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
