"""Beside an engine on another host: reads its GPUs and sets their clocks there, as a gateway elsewhere says."""
