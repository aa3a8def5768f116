"""Messages to systemd, as sd_notify(3) sends them."""

import contextlib
import os
import socket

READY = b"READY=1"
ALIVE = b"WATCHDOG=1"


def notify(message: bytes) -> None:
    """Send it to the socket in NOTIFY_SOCKET, if there is one. Never waits, and never fails: the keeper works without
    systemd, and with one that does not read.
    """
    if address := os.environ.get("NOTIFY_SOCKET"):
        if address[0] == "@":  # a name in Linux' abstract namespace
            address = "\0" + address[1:]
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(message, socket.MSG_DONTWAIT, address)
