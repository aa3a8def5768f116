"""Every kind of fault, by its name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tools.soak.faults import disk, gateway, gpu, keeper, socket
from tools.soak.faults.kind import Kind

KINDS: Mapping[str, Kind] = MappingProxyType(
    {kind.name: kind for module in (keeper, gateway, gpu, disk, socket) for kind in module.KINDS}
)
