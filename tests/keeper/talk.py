"""A connection to the keeper with nothing clever about it: what is said is said, what comes back is what came back."""

import json
import socket

ANSWER_S = 10.0


class Talk:
    """One connection. A keeper that hangs up raises ConnectionError."""

    def __init__(self, path, answer_s=ANSWER_S):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(answer_s)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise
        self._lines = self.socket.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def ask(self, op, **fields):
        """What it answers."""
        self.say({"op": op, **fields})
        return self.hear()

    def done(self, op, **fields):
        """Asked for, and done."""
        answer = self.ask(op, **fields)
        assert answer["ok"], answer
        return answer

    def refused(self, op, **fields):
        """Asked for, and refused: with which code."""
        answer = self.ask(op, **fields)
        assert not answer["ok"], answer
        assert answer["error"]
        return answer["code"]

    def say(self, what):
        """A JSON value, or bytes as they are."""
        self.socket.sendall(what if isinstance(what, bytes) else json.dumps(what).encode() + b"\n")

    def hear(self):
        """The next line."""
        line = self._lines.readline()
        if not line:
            raise ConnectionAbortedError("the keeper hung up")
        return json.loads(line)

    def hung_up(self):
        """Whether the keeper has ended it; whatever it still said is thrown away."""
        try:
            while self._lines.readline():
                pass
        except ConnectionError:
            pass
        return True

    @property
    def closed(self):
        return self._lines.closed

    def close(self):
        self._lines.close()
        self.socket.close()
