"""The pure control core: events in, commands out. No clock, I/O, thread, environment or global."""
