"""The HTTP front door: the control core in front of live engines."""
