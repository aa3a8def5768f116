"""Every kind of fault, by its name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tools.soak import faults_disk, faults_gateway, faults_gpu, faults_keeper, faults_socket
from tools.soak.kind import Kind

KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        kind.name: kind
        for module in (faults_keeper, faults_gateway, faults_gpu, faults_disk, faults_socket)
        for kind in module.KINDS
    }
)
