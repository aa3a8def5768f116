"""Roles for the tests of the fork server."""

import json
import os
import time

from tools.testbed.fork_server import die_with


def speak(order):
    """Prints what it got."""
    print(order["text"], os.environ["WHERE"], os.getpgid(0) == os.getpid(), flush=True)


def echo(order):
    """Sends lines back."""
    for line in order["control"].makefile("rb"):
        order["control"].sendall(json.dumps({"got": json.loads(line)}).encode() + b"\n")


def fail(order):
    raise ValueError("this role is broken")


def leave(order):
    raise SystemExit(7)


def orphan(order):
    """Its parent has ended before it could ask to be told."""
    die_with(os.getpid())


def stay(order):
    time.sleep(60)


ROLES = {each.__name__: each for each in (speak, echo, fail, leave, orphan, stay)}
