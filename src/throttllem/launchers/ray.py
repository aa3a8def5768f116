"""Engines on a Ray cluster: a placement group and a detached actor each, which runs the engine's command.

Runs in a process that has Ray (`python -m throttllem.launchers --ray`), never in the gateway's. An engine runs on the
node that its url names. The actor outlives this process; Ray neither restarts it nor repeats its calls. Knows nothing
of readiness.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from throttllem.launchers.base import NOT_RUN, Ended, EngineCommand, Launched, LaunchError

# What follows from trials with Ray 2.60:
#
# - A placement group is never removed by Ray, so each end of an engine removes its own, and a start removes one that
#   was left under its name.
# - A node without room is not told from a slow one: after ROOM_S it counts as one.
# - An actor that has died proves nothing of its engine's host: a node whose raylet stands still is declared dead after
#   seconds while its engine runs on. Such an end is uncertain, and the gateway looks for itself.
# - The engine must not lead a session of its own: Ray ends the children of an actor with it.

_NAMESPACE = "throttllem"
ROOM_S = 10.0
_CALL_S = 20.0
_STOP_S = 15.0
_CALLS = 8
"""Calls of one actor at a time: `wait` holds one for as long as the engine runs."""


class RayLauncher:
    """`ray` is the module, connected to a cluster."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def launch(self, command: EngineCommand) -> Launched:
        """Start its actor on the node of its host; one GPU for each of `gpus`, where the node has any."""
        async with self._locks[command.engine_id]:
            found = await self._actor(command.engine_id)
            if found is not None:
                words = await self._call(found.words.remote())
                if words == command.words:
                    return _launched(command.engine_id, found, adopted=True)
                await self._stop(command.engine_id, found)
            actor = await asyncio.to_thread(self._make, command)
            try:
                if await self._call(actor.start.remote(command.words, dict(command.environment), command.port)):
                    return _launched(command.engine_id, actor)
            except LaunchError:
                await self._stop(command.engine_id, actor)
                raise
            await self._stop(command.engine_id, actor)  # what listens on its port is taken to be the engine
            return Launched(engine_id=command.engine_id)

    async def stop(self, engine_id: str) -> None:
        """SIGTERM to its process, SIGKILL where that is not enough; then its actor and its place go."""
        async with self._locks[engine_id]:
            if (actor := await self._actor(engine_id)) is not None:
                await self._stop(engine_id, actor)

    async def listed(self) -> tuple[Launched, ...]:
        """Every actor of this launcher's namespace."""
        named = await asyncio.to_thread(self._ray.util.list_named_actors, True)
        names = sorted(each["name"] for each in named if each["namespace"] == _NAMESPACE)
        found = [(name, await self._actor(name)) for name in names]
        return tuple(_launched(name, actor, adopted=True) for name, actor in found if actor is not None)

    async def watch(self, engine_id: str) -> Ended:
        """Wait for the end of its process, or of its actor."""
        actor = await self._actor(engine_id)
        if actor is None:
            return NOT_RUN
        try:
            ended = Ended(why=await actor.wait.remote(), certain=True)
        except self._ray.exceptions.RayError as error:
            ended = Ended(why=f"its Ray actor is lost: {type(error).__name__}", certain=False)
        async with self._locks[engine_id]:
            if (now := await self._actor(engine_id)) is None or _id(now) == _id(actor):
                await asyncio.to_thread(self._remove, engine_id, actor)
        return ended

    # ---- Ray -------------------------------------------------------------------------------------------------

    async def _actor(self, engine_id: str) -> Any:
        try:
            return await asyncio.to_thread(self._ray.get_actor, engine_id, _NAMESPACE)
        except ValueError:  # Ray has no actor of this name
            return None

    async def _call(self, reference: Any, within_s: float = _CALL_S) -> Any:
        try:
            async with asyncio.timeout(within_s):
                return await reference
        except (TimeoutError, self._ray.exceptions.RayError) as error:
            cause = getattr(error, "cause", None) or error
            raise LaunchError(f"its Ray actor failed: {cause or type(error).__name__}") from error

    async def _stop(self, engine_id: str, actor: Any) -> None:
        with contextlib.suppress(LaunchError):  # an actor that does not answer is killed, and its engine with it
            await self._call(actor.stop.remote(_STOP_S), _STOP_S + _CALL_S)
        await asyncio.to_thread(self._remove, engine_id, actor)

    def _remove(self, engine_id: str, actor: Any) -> None:
        self._ray.kill(actor)
        self._remove_group(engine_id)

    def _remove_group(self, engine_id: str) -> None:
        with contextlib.suppress(ValueError):  # there is none
            self._ray.util.remove_placement_group(self._ray.util.get_placement_group(engine_id))

    def _make(self, command: EngineCommand) -> Any:
        """A new actor in a new placement group on the node of the engine's host."""
        ray, address = self._ray, socket.gethostbyname(command.host)
        node = next((each for each in ray.nodes() if each["Alive"] and each["NodeManagerAddress"] == address), None)
        if node is None:
            known = ", ".join(sorted(each["NodeManagerAddress"] for each in ray.nodes() if each["Alive"]))
            raise LaunchError(f"{command.host} of its url is no node of the Ray cluster, which has {known}")
        gpus = command.gpus if node["Resources"].get("GPU") else 0
        self._remove_group(command.engine_id)
        group = ray.util.placement_group(
            [{f"node:{address}": 0.001} | ({"GPU": gpus} if gpus else {})],
            strategy="STRICT_PACK",
            name=command.engine_id,
            lifetime="detached",
        )
        if not group.wait(ROOM_S):
            ray.util.remove_placement_group(group)
            raise LaunchError(f"node {address} of the Ray cluster has no room for {gpus} GPUs")
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(placement_group=group)
        return (
            ray.remote(_engine())
            .options(
                name=command.engine_id,
                namespace=_NAMESPACE,
                lifetime="detached",
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=_CALLS,
                num_cpus=0,
                num_gpus=gpus,
                scheduling_strategy=strategy,
            )
            .remote()
        )


def _id(actor: Any) -> str:
    return str(actor._actor_id.hex())


def _launched(engine_id: str, actor: Any, *, adopted: bool = False) -> Launched:
    name = _id(actor)
    log = f"`ray logs actor --id {name}`"
    return Launched(engine_id=engine_id, incarnation=f"Ray actor {name}", log=log, adopted=adopted)


def _engine() -> type:
    """The actor's class. It is made in a function, so that Ray sends its code: nodes need nothing of throttllem."""

    class Engine:
        """One engine's process."""

        def __init__(self) -> None:
            self._words: tuple[str, ...] = ()
            self._process: subprocess.Popen[bytes] | None = None
            self._asked = False

        def words(self) -> tuple[str, ...]:
            """What it was started with."""
            return self._words

        def start(self, words: Sequence[str], environment: Mapping[str, str], port: int) -> bool:
            """Start it; False where something listens on its port of this node already."""
            with contextlib.suppress(OSError):
                socket.create_connection((_address(), port), timeout=1.0).close()
                return False
            self._words = tuple(words)
            self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, env=os.environ | dict(environment))
            return True

        def wait(self) -> str:
            """Wait for its end; why it ended."""
            if self._process is None:
                return "it was not started"
            code = self._process.wait()
            if self._asked:
                return "it was stopped"
            status = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
            return f"process {self._process.pid} ended {status}"

        def stop(self, patience_s: float) -> None:
            """End it."""
            self._asked = True
            if self._process is not None:
                self._process.terminate()
                try:
                    self._process.wait(patience_s)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    self._process.wait()

    def _address() -> str:
        import ray  # noqa: PLC0415

        return str(ray.util.get_node_ip_address())

    return Engine


def ray_launcher(address: str) -> RayLauncher:
    """A launcher on the cluster at this address ("auto": the one of this node). Raises ConnectionError."""
    import ray  # noqa: PLC0415

    ray.init(address=address, namespace=_NAMESPACE, log_to_driver=False, logging_level="WARNING")
    return RayLauncher(ray)
