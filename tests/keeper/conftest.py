"""See rig."""

from tests.keeper.rig import folder, keeper, keepers, library, machine, nursery, talk

__all__ = ["folder", "keeper", "keepers", "library", "machine", "nursery", "talk"]
