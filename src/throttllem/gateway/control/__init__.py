"""The control loop: wall clock, sessions, backends."""
