"""Fault schedules against the keeper of clocks, by the thousand: real processes, sockets and files, fake GPUs."""
