"""The fixtures of rig."""

from tests.keeper.rig import client, folder, keeper, keepers, library, machine, processes

__all__ = ["client", "folder", "keeper", "keepers", "library", "machine", "processes"]
