"""A language model for the real Triton: runs inside its Python backend, in the place of TensorRT-LLM's ensemble.

In-flight batching is real (requests join and leave between iterations, prompts go whole, the KV cache is reserved
ahead, cancelled requests leave), text and speed are made up: words that follow from the prompt, one per iteration,
`step_s` + `row_s` x batch seconds each. Metrics bear TensorRT-LLM's names. A prompt with "fail after N" fails.
"""

# Imported by Triton, not by the project: its types are not at hand here.
# mypy: ignore-errors

import collections
import json
import random
import re
import threading
import time
import zlib

import numpy as np
import triton_python_backend_utils as pb_utils

SYLLABLES = ("ba", "de", "fi", "go", "lu", "ma", "ne", "pi", "ro", "su", "ta", "ve")
GAUGES = {
    "kv_cache_block": ("kv_cache_block_type", ("max", "free", "used", "tokens_per")),
    "request": ("request_type", ("active", "scheduled", "max")),
}


class SequenceState:
    """One request: its words to come, and its text so far."""

    def __init__(self, request, block_tokens):
        def value(name, default):
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            return default if tensor is None else tensor.as_numpy().ravel().tolist()

        self.sender = request.get_response_sender()
        prompt = value("text_input", [b""])[0].decode()
        self.limit = value("max_tokens", [16])[0]
        self.stops = [word.decode() for word in value("stop_words", []) if word]
        self.stream = bool(value("stream", [False])[0])
        seed = value("random_seed", [0])[0]
        self.draw = random.Random(zlib.crc32(prompt.encode()) + seed)
        natural = max(value("min_length", [1])[0], self.draw.randint(20, 400))
        self.tokens = min(self.limit, natural)
        failing = re.search(r"fail after (\d+)", prompt)
        self.fails_at = int(failing[1]) if failing else None
        self.blocks = -(-(len(prompt) // 4 + 1 + self.limit) // block_tokens)
        self.given = 0
        self.text = ""

    def word(self):
        """The next token: " word", now and then with a full stop."""
        word = "".join(self.draw.choices(SYLLABLES, k=self.draw.randint(1, 3)))
        return f" {word}." if self.draw.random() < 0.1 else f" {word}"

    def step(self):
        """One iteration: True if the row is over."""
        if self.cancelled():
            return True
        if self.fails_at is not None and self.given >= self.fails_at:
            self.fail("the model failed, as it was asked to")
            return True
        word = self.word()
        self.given += 1
        self.text += word
        last = self.given >= self.tokens or any(stop in self.text for stop in self.stops)
        if self.stream or last:
            self._send(word if self.stream else self.text, last=last)
        return last

    def cancelled(self):
        """Whether the client is gone; ends the request if so."""
        gone = self.sender.is_cancelled()
        if gone:
            self.sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return gone

    def fail(self, why):
        """End the request with an error."""
        self._send(None, last=True, error=pb_utils.TritonError(why))

    def _send(self, text, *, last, error=None):
        tensors = [] if text is None else [pb_utils.Tensor("text_output", np.array([[text.encode()]], dtype=object))]
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0
        self.sender.send(pb_utils.InferenceResponse(output_tensors=tensors, error=error), flags=flags)


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args):
        """Read the parameters of config.pbtxt, make the metrics, start the engine's thread."""
        settings = {name: float(entry["string_value"]) for name, entry in self._parameters(args)}
        self.step_s, self.row_s = settings["step_s"], settings["row_s"]
        self.max_rows, self.kv_blocks = int(settings["max_rows"]), int(settings["kv_blocks"])
        self.block_tokens = int(settings["block_tokens"])
        self.waiting, self.running = collections.deque(), []
        self.gauges = {
            family: {kind: self._gauge(family, label, kind) for kind in kinds}
            for family, (label, kinds) in GAUGES.items()
        }
        self.wake, self.over = threading.Condition(), False
        self._measure()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def execute(self, requests):
        """Take requests in; their answers are sent by the engine's thread."""
        with self.wake:
            for row in [SequenceState(request, self.block_tokens) for request in requests]:
                if row.blocks > self.kv_blocks:
                    row.fail("the KV cache cannot hold the request")
                else:
                    self.waiting.append(row)
            self.wake.notify()

    def finalize(self):
        """Stop the engine's thread."""
        with self.wake:
            self.over = True
            self.wake.notify()
        self.thread.join()

    def _parameters(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        return [(name, entry) for name, entry in parameters.items() if name != "batch_scheduler_policy"]

    def _gauge(self, family, label, kind):
        if not hasattr(self, "families"):
            self.families = {
                name: pb_utils.MetricFamily(
                    name=f"nv_trt_llm_{name}_metrics",
                    description=f"{name} metrics under TensorRT-LLM's name",
                    kind=pb_utils.MetricFamily.GAUGE,
                )
                for name in GAUGES
            }
        return self.families[family].Metric(labels={label: kind, "model": "tensorrt_llm", "version": "1"})

    def _measure(self):
        used = sum(row.blocks for row in self.running)
        blocks = {"max": self.kv_blocks, "used": used, "free": self.kv_blocks - used, "tokens_per": self.block_tokens}
        requests = {"active": len(self.running) + len(self.waiting), "scheduled": len(self.running)}
        for family, values in (("kv_cache_block", blocks), ("request", requests | {"max": self.max_rows})):
            for kind, value in values.items():
                self.gauges[family][kind].set(value)

    def _admit(self):
        self.waiting = collections.deque(row for row in self.waiting if not row.cancelled())
        free = self.kv_blocks - sum(row.blocks for row in self.running)
        while self.waiting and len(self.running) < self.max_rows and self.waiting[0].blocks <= free:
            free -= self.waiting[0].blocks
            self.running.append(self.waiting.popleft())

    def _run(self):
        while True:
            with self.wake:
                self.wake.wait_for(lambda: self.over or self.waiting or self.running)
                if self.over:
                    return
                self._admit()
                self._measure()
            time.sleep(self.step_s + self.row_s * len(self.running))
            self.running = [row for row in self.running if not row.step()]
            self._measure()
