"""zeus and aiperf, unmodified, on the GPUs of tools/nvml. `make engines` installs them, `make test-real` runs this."""

import json
import os
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tools.nvml.machine import Machine, Op, a100
from tools.testbed.engines.vllm import ENVIRONMENT as OFFLINE
from tools.testbed.known_clients import REPOSITORY, tokenizer_cache

pytestmark = pytest.mark.real
ENVIRONMENT = Path(__file__).parents[2] / ".engines/clients"
ZEUS = """
import json, sys, time
from zeus.device import get_gpus
from zeus.device.gpu.common import ZeusGPUNoPermissionError
from zeus.monitor import ZeusMonitor
gpus = get_gpus()
found = {"name": gpus.get_name(0), "limits": gpus.get_power_management_limit_constraints(0)}
found["clocks"] = gpus.get_supported_graphics_clocks(0, gpus.get_supported_memory_clocks(0)[0])
gpus.set_gpu_locked_clocks(0, 900, 900)
gpus.set_power_management_limit(1, 300_000)
monitor = ZeusMonitor(cpu_indices=[])
monitor.begin_window("all", sync_execution=False)
time.sleep(2)
measured = monitor.end_window("all", sync_execution=False)
found |= {"j": measured.gpu_energy, "s": measured.time}
found |= {"w": gpus.get_instant_power_usage(0) / 1000, "average": gpus.get_average_power_usage(0) / 1000}
found["celsius"] = gpus.get_gpu_temperature(0)
print(json.dumps(found), flush=True)
sys.stdin.readline()
try:
    gpus.reset_gpu_locked_clocks(0)
except ZeusGPUNoPermissionError:
    print("denied")
"""
COLLECTOR = """
import asyncio, json
from aiperf.gpu_telemetry.pynvml_collector import PyNVMLTelemetryCollector
records = []
async def keep(found, _):
    records.extend(found)
async def main():
    collector = PyNVMLTelemetryCollector(collection_interval=0.05, record_callback=keep)
    assert await collector.is_url_reachable()
    await collector.initialize()
    await collector.start()
    async with asyncio.timeout(60):
        while len(records) < 6:
            await asyncio.sleep(0.05)
    await collector.stop()
    print(json.dumps([record.model_dump(exclude_none=True) for record in records], default=str))
asyncio.run(main())
"""
TOKENIZER = """
import inspect, sys
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast
trained = ByteLevelBPETokenizer()
trained.train_from_iterator([inspect.getsource(inspect)], vocab_size=1000, special_tokens=["<s>", "</s>"])
made = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>")
made.save_pretrained(sys.argv[1])
"""


@pytest.fixture(scope="module")
def python():
    found = ENVIRONMENT / "bin/python"
    if not found.exists():
        pytest.skip("no clients in .engines: `make engines` installs them")
    return found


@pytest.fixture
def machine(make_gpus):
    return make_gpus(*a100(2))


def test_zeus_measures_and_sets(python, machine):
    if subprocess.run([python, "-c", "import zeus"], check=False, capture_output=True, timeout=60).returncode:
        pytest.skip("no zeus in .engines/clients")
    first, second = machine.gpus
    first.work(1, 60)
    with subprocess.Popen(
        [python, "-c", ZEUS],
        env=os.environ | machine.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        killer = threading.Timer(60, process.kill)
        killer.start()
        found = json.loads(process.stdout.readline())
        first.permission(False)
        denied, _ = process.communicate("\n")
        killer.cancel()
    assert process.returncode == 0
    part = a100()[0]
    busy_w = part.busy_w[part.clocks_mhz.index(900)]
    assert (found["name"], found["limits"]) == (part.name, [100_000, 400_000])
    assert found["clocks"] == sorted(part.clocks_mhz, reverse=True)
    assert found["w"] == pytest.approx(busy_w, rel=1e-3)
    assert found["celsius"] == 40
    # The counter moves every 100 ms: up to one step of 2 s is missing or too much, and the switch is in the window.
    assert found["j"]["0"] == pytest.approx(busy_w * found["s"], rel=0.12)
    assert found["j"]["1"] == pytest.approx(part.idle_w * found["s"], rel=0.12)
    assert (first.lock, denied) == ((900, 900), "denied\n")
    assert [(write.op, write.gpu) for write in machine.writes()] == [
        (Op.LOCK, 0),
        (Op.POWER_LIMIT, 1),
        (Op.UNLOCK, 0),
    ]
    assert (first.attempted, first.effective, second.effective) == (2, 1, 1)


def test_the_collector_of_aiperf_reads_both_gpus(python, machine):
    machine.gpus[1].work(0.5, 60)
    done = subprocess.run(
        [python, "-c", COLLECTOR],
        env=os.environ | machine.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout.splitlines()[-1])
    assert len(records) >= 6
    last = {record["gpu_index"]: record for record in records}
    assert [last[index]["gpu_uuid"] for index in (0, 1)] == [gpu.uuid for gpu in machine.gpus]
    assert last[0]["telemetry_data"]["nvidia_power_usage"] == pytest.approx(machine.gpus[0].watts, rel=0.01)
    assert last[1]["telemetry_data"]["nvidia_power_usage"] == pytest.approx(machine.gpus[1].watts, rel=0.01)
    assert last[1]["telemetry_data"]["nvidia_gpu_utilization"] == 50
    assert 0 < last[1]["telemetry_data"]["nvidia_energy_consumption"] * 1e6 <= machine.gpus[1].energy_j
    assert "nvidia_jpg_utilization" not in last[1]["telemetry_data"]
    assert machine.writes() == []


class Answer(BaseHTTPRequestHandler):
    """A chat completion of 20 tokens, 20 ms apart, that keeps the first GPU busy."""

    protocol_version = "HTTP/1.1"
    machine: Machine
    energies_j: list[float]

    def do_POST(self):
        self.energies_j.append(self.machine.gpus[0].energy_j)
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for _ in range(20):
            self.machine.gpus[0].work(1, 0.03)
            self.event({"choices": [{"index": 0, "delta": {"content": "word "}, "finish_reason": None}]})
            time.sleep(0.02)
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        usage = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True
        self.energies_j.append(self.machine.gpus[0].energy_j)

    def event(self, more):
        content = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "tiny", **more}
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *_):
        pass


@contextmanager
def engine_on(machine):
    energies_j: list[float] = []
    own = {"machine": machine, "energies_j": energies_j}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("AnswerOf", (Answer,), own))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", energies_j
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def test_aiperf_counts_the_energy_of_a_run(python, machine, tmp_path):
    subprocess.run([python, "-c", TOKENIZER, tmp_path / "model"], check=True, capture_output=True, timeout=120)
    more = OFFLINE | {"HF_HOME": str(tokenizer_cache(tmp_path / "model", tmp_path / "cache"))}
    with engine_on(machine) as (url, energies_j):
        command = [
            *(python.with_name("aiperf"), "profile", "--model", "tiny", "--url", url),
            *("--tokenizer", REPOSITORY),
            *("--endpoint-type", "chat", "--streaming", "--use-server-token-count", "--concurrency", "2"),
            *("--request-count", "20", "--isl", "16", "--osl", "20", "--gpu-telemetry", "pynvml"),
            *("--no-server-metrics", "--ui", "none", "--output-artifact-dir", str(tmp_path / "out")),
            *("--workers-max", "1", "--record-processors", "1"),
        ]
        before = machine.gpus[0].energy_j
        done = subprocess.run(
            command,
            env=os.environ | more | machine.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        spent_j, answered_j = machine.gpus[0].energy_j - before, max(energies_j) - min(energies_j)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    found = json.loads((tmp_path / "out/profile_export_aiperf.json").read_text())
    assert found["request_count"]["avg"] == 20
    gpus = found["telemetry_data"]["endpoints"]["localhost"]["gpus"]
    counted_j = [gpus[f"gpu_{index}"]["metrics"]["nvidia_energy_consumption"]["avg"] * 1e6 for index in (0, 1)]
    # From before the first request to after the last, but for one step of the counter: 100 ms of at most 400 W.
    assert answered_j - 41 < counted_j[0] <= spent_j
    assert found["nvidia_total_gpu_energy"]["avg"] == pytest.approx(sum(counted_j))
    assert found["nvidia_energy_per_request"]["avg"] == pytest.approx(sum(counted_j) / 20)
