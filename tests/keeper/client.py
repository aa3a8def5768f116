"""A plain connection to the keeper: sends what it is given, and returns what comes back."""

import json
import socket
import time

ANSWER_S = 10.0


class Client:
    """One connection. Raises ConnectionError if the keeper closes it."""

    def __init__(self, path, answer_s=ANSWER_S):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(answer_s)
        ends_s = time.monotonic() + answer_s
        try:
            while True:
                try:
                    self.socket.connect(str(path))
                    break
                except BlockingIOError:  # a flood fills the queue
                    assert time.monotonic() < ends_s
                    time.sleep(0.001)
        except OSError:
            self.socket.close()
            raise
        self._lines = self.socket.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def request(self, op, **fields):
        """The answer."""
        self.send({"op": op, **fields})
        return self.receive()

    def ok(self, op, **fields):
        """The answer to a request that is carried out."""
        answer = self.request(op, **fields)
        assert answer["ok"], answer
        return answer

    def rejected(self, op, **fields):
        """The code of a request that is rejected."""
        answer = self.request(op, **fields)
        assert not answer["ok"], answer
        assert answer["error"]
        return answer["code"]

    def send(self, what):
        """A JSON value, or bytes as they are."""
        self.socket.sendall(what if isinstance(what, bytes) else json.dumps(what).encode() + b"\n")

    def receive(self):
        """The next line."""
        line = self._lines.readline()
        if not line:
            raise ConnectionAbortedError("the keeper closed the connection")
        return json.loads(line)

    def disconnected(self):
        """Wait until the keeper has closed it; true. Drops what it still sent."""
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
