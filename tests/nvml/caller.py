"""Another process with the unmodified nvidia-ml-py, which does what it is told line by line."""

import ast
import os
import select
import subprocess
import sys

LIMIT_S = 10
SCRIPT = """
import ctypes, os, sys, time
from pynvml import *
def work(gpu, util, valid_s):
    return ctypes.CDLL("libnvidia-ml.so.1").fake_nvml_work(gpu, ctypes.c_double(util), ctypes.c_double(valid_s))
def clock(gpu):
    return ctypes.CDLL("libnvidia-ml.so.1").fake_nvml_clock(gpu)
def fields(structure):
    return {name: getattr(structure, name) for name, *_ in structure._fields_}
for line in sys.stdin:
    try:
        try:
            code = compile(line, "told", "eval")
        except SyntaxError:
            code = compile(line, "told", "exec")
        print(repr(("ok", eval(code))), flush=True)
    except NVMLError as error:
        print(repr((type(error).__name__, str(error))), flush=True)
"""


class FailedError(Exception):
    """What NVML answered, as nvidia-ml-py names it."""


class Caller:
    def __init__(self, machine, *, init=True, environment=None):
        more = machine.environment() | (environment or {})
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | more,
            text=True,
            bufsize=1,
        )
        self.pid = self.process.pid
        if init:
            self("nvmlInit()")
            self("gpu, *others = [nvmlDeviceGetHandleByIndex(index) for index in range(nvmlDeviceGetCount())]")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(LIMIT_S)
        self.process.stdin.close()
        self.process.stdout.close()

    def send(self, line):
        self.process.stdin.write(line + "\n")

    def answer(self):
        ready, _, _ = select.select([self.process.stdout], [], [], LIMIT_S)
        assert ready, "no answer"
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(self.process.wait(LIMIT_S))
        kind, value = ast.literal_eval(line)
        if kind != "ok":
            raise FailedError(kind.removeprefix("NVMLError_"))
        return value

    def __call__(self, line):
        self.send(line)
        return self.answer()

    def dies(self, line):
        """By which signal."""
        self.send(line)
        return -self.process.wait(LIMIT_S)
