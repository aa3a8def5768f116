"""A whole gateway over the fake NVML and a real keeper: clocks set while it serves, restored when it stops."""

import asyncio
import contextlib
import os
import queue
import re
import shlex
import sys
import threading

import pytest
from aiohttp import web

from gateway.test_run import lived, options
from tests.engines.upstreams import served as upstream
from tests.engines.vllm_peer import VllmPeer
from throttllem.config import ClockOptions, EngineEntry
from throttllem.gateway.check import check_configuration
from throttllem.gateway.run import run_gateway
from tools.nvml.machine import a100, h100
from tools.testbed.processes import free_port


async def answer(request):
    usage = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    choice = {"index": 0, "text": "a b c", "finish_reason": "length"}
    return web.json_response({"id": "1", "object": "text_completion", "choices": [choice], "usage": usage})


@contextlib.contextmanager
def engine_in_a_thread():
    """The URL of an engine that another thread serves."""
    urls, over, loop = queue.Queue(), asyncio.Event(), asyncio.new_event_loop()

    async def serve():
        peer = VllmPeer()
        async with upstream(peer.routes() | {("POST", "/v1/completions"): answer}) as url:
            urls.put(url)
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        yield urls.get(timeout=10)
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(10)
        loop.close()


def served(tmp_path, keeper, mode, during):
    with engine_in_a_thread() as url:
        entry = EngineEntry(kind="openai", url=url, gpus=("0",), max_batch=8, kv_blocks=100, block_tokens=16)
        made = options(tmp_path, engines=(entry,), clocks=ClockOptions(mode=mode, keeper=keeper, ttl_s=2.0))
        return lived(run_gateway(made, tmp_path / "cache"), during), made


@pytest.mark.parametrize(
    ("mode", "locked", "set_now"), [("on", (1410, 1410), 1), ("dry-run", None, 0), ("off", None, 0)]
)
def test_clocks_while_it_serves_and_after(tmp_path, machine, keeper, mode, locked, set_now):
    seen = {}

    async def during(http, api, private):
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": 3}
        async with asyncio.timeout(10):
            while True:
                async with http.post(f"{api}/completions", json=body) as response:
                    if response.status == 200:
                        break
                await asyncio.sleep(0.05)
            while machine.gpus[0].lock != locked:
                await asyncio.sleep(0.01)
        async with http.get(private + "/metrics") as response:
            seen["metrics"] = await response.text()

    messages, _ = served(tmp_path, keeper, mode, during)
    assert messages[-1] == "stopped"
    assert machine.gpus[0].lock is None
    assert (machine.gpus[0].attempted == 0) == (mode != "on")
    (line,) = [line for line in seen["metrics"].splitlines() if line.startswith("throttllem_clocks_set{")]
    assert float(line.split()[-1]) == set_now
    assert "throttllem_energy_joules_total" in seen["metrics"]


def test_an_engine_on_another_gpu_is_shown_everywhere(tmp_path, make_gpus_here):
    """The engine's process (this one) computes on GPU 1, and `gpus` names GPU 0."""
    made = make_gpus_here(*a100(2, switch_ms=(0, 0)))
    made.gpus[1].processes([os.getpid()])
    seen = {}

    async def during(http, api, private):
        async with asyncio.timeout(10):
            while "wrong GPU" not in str(seen):
                async with http.get(private + "/dashboard/state") as response:
                    seen["notes"] = (await response.json())["status"]["models"][0]["engines"][0]["notes"]
                await asyncio.sleep(0.02)

    with engine_in_a_thread() as url:
        entry = EngineEntry(kind="openai", url=url, gpus=("0",))
        wanted = options(tmp_path, engines=(entry,))
        messages = lived(run_gateway(wanted, tmp_path / "cache"), during)
        findings = asyncio.run(check_configuration(wanted, {}, tmp_path / "cache"))
    text = (
        "computes on GPU 1, which is not among its `gpus`, and not on GPU 0: joules and clocks are those of the wrong"
    )
    assert any(line.startswith("!!") and text in line for line in messages)
    assert any(note.startswith("!! ") and text in note for note in seen["notes"])
    assert [finding.mark for finding in findings if text in finding.text] == ["!!"]


def test_a_missing_keeper_is_found_by_check_and_does_not_keep_the_gateway_from_serving(tmp_path, machine):
    async def during(http, api, private):
        async with http.get(private + "/dashboard/state") as response:
            state = await response.json()
        assert "keeper" in str(state["status"]["models"][0]["engines"][0]["unset"])

    _, made = served(tmp_path, tmp_path / "none.sock", "on", _wait_for_unset(during))
    findings = asyncio.run(check_configuration(made, {}, tmp_path / "cache"))
    (found,) = [finding for finding in findings if "would be a dry run (though" in finding.text]
    assert found.mark == "!!" and not found.fatal
    assert machine.gpus[0].attempted == 0


@pytest.mark.parametrize(
    ("mode", "origins", "text"),
    [
        ("on", {"clocks.mode": "t.toml:2"}, "would be on (clocks.mode = on, t.toml:2): set through the keeper at "),
        (
            "dry-run",
            {},
            "would be a dry run (clocks.mode = dry-run, the default): decided, recorded and shown, never set",
        ),
        ("off", {"clocks.mode": "command line"}, "would be off (clocks.mode = off, command line): left alone"),
    ],
)
def test_check_shows_which_mode_would_run(tmp_path, machine, keeper, mode, origins, text):
    entry = EngineEntry(kind="openai", url="http://127.0.0.1:9", gpus=("0",))
    made = options(tmp_path, engines=(entry,), clocks=ClockOptions(mode=mode, keeper=keeper))
    findings = asyncio.run(check_configuration(made, origins, tmp_path / "cache"))
    (found,) = [finding for finding in findings if "clocks would" in finding.text]
    assert (found.mark, text in found.text) == ("ok", True), found
    assert any("1 GPU of kind a100-40gb-sxm at " in finding.text for finding in findings)
    assert machine.gpus[0].attempted == 0


def clock_finding(tmp_path, **clocks):
    """The finding of --check that shows how clocks would be set."""
    entry = EngineEntry(kind="openai", url="http://127.0.0.1:9", gpus=("0",))
    made = options(tmp_path, engines=(entry,), clocks=ClockOptions(mode="on", **clocks))
    findings = asyncio.run(check_configuration(made, {}, tmp_path / "cache"))
    (found,) = [finding for finding in findings if "clocks would " in finding.text]
    assert not found.fatal
    return found


@pytest.mark.parametrize(
    ("status", "mark", "text"),
    [
        (lambda uuid: {"allowed": {}}, "!!", "would be a dry run .*: the keeper was not given --gpu {uuid}$"),
        (
            lambda uuid: {"allowed": {uuid: [210, 1410]}, "held": {uuid: {"by": "process 7 of user 0", "mhz": 900}}},
            "--",
            r"would be on .*once its present holder releases {uuid} \(process 7 of user 0\)$",
        ),
        (lambda uuid: {"allowed": {uuid: [210, 1200]}, "held": {}}, "--", "would be on .*at most 1200 of 1410 MHz"),
        (
            lambda uuid: {"allowed": {uuid: [100, 200]}, "held": {}},
            "!!",
            "would be on .*where these GPUs have no clock",
        ),
    ],
)
def test_check_shows_what_the_keeper_would_not_do(tmp_path, machine, monkeypatch, status, mark, text):
    uuid = machine.gpus[0].uuid

    async def answered(socket):
        return status(uuid)

    monkeypatch.setattr("throttllem.gateway.check.keeper_status", answered)
    found = clock_finding(tmp_path)
    assert found.mark == mark
    assert re.search(text.format(uuid=uuid), found.text), found.text


def test_check_finds_a_missing_zeusd(tmp_path, machine):
    found = clock_finding(tmp_path, zeusd=tmp_path / "nowhere")
    assert found.mark == "!!"
    assert "would be a dry run" in found.text
    assert "nowhere: [Errno 2]" in found.text


def test_a_gpu_of_another_kind_is_an_error(tmp_path, machine):
    entry = EngineEntry(kind="openai", url="http://127.0.0.1:9", gpu="h100-80gb-sxm", gpus=("0",))
    findings = asyncio.run(check_configuration(options(tmp_path, engines=(entry,)), {}, tmp_path / "cache"))
    (found,) = [finding for finding in findings if finding.fatal]
    assert "is not h100-80gb-sxm: 42.5 GB, not 85.5 and up to 1410 MHz, not 1980" in found.text
    assert "leave --gpu out, or name a100-40gb-sxm" in found.text


def test_the_kind_is_that_of_the_boards(tmp_path, make_gpus_here):
    make_gpus_here(*h100(1, name="NVIDIA H20", limit_w=500.0, cores=9984))
    entry = EngineEntry(kind="openai", url="http://127.0.0.1:9", gpus=("0",))
    findings = asyncio.run(check_configuration(options(tmp_path, engines=(entry,)), {}, tmp_path / "cache"))
    assert not [finding for finding in findings if finding.fatal]
    (said,) = [
        finding for finding in findings if "is no GPU of the catalogue: modelled after h100-80gb-sxm" in finding.text
    ]
    assert said.mark == "--" and "NVIDIA H20 (85.5 GB, up to 1980 MHz, 500 W" in said.text


def test_gpus_of_two_kinds_make_no_engine(tmp_path, make_gpus_here):
    make_gpus_here(*a100(1), *h100(1, uuid="GPU-2"))
    entry = EngineEntry(kind="openai", url="http://127.0.0.1:9", gpus=("0", "1"), tp=2)
    findings = asyncio.run(check_configuration(options(tmp_path, engines=(entry,)), {}, tmp_path / "cache"))
    (found,) = [finding for finding in findings if finding.fatal]
    assert "GPUs of several kinds: 0 = a100-40gb-sxm, 1 = h100-80gb-sxm" in found.text


def test_two_engines_on_one_gpu_would_not_start(tmp_path, machine):
    url, names = "http://127.0.0.1:9", ("one", "two")
    entries = tuple(EngineEntry(kind="openai", url=url, served_as=name, gpus=("0",)) for name in names)
    findings = asyncio.run(check_configuration(options(tmp_path, engines=entries), {}, tmp_path / "cache"))
    (found,) = [finding for finding in findings if finding.fatal]
    assert found.mark == "!!"
    assert machine.gpus[0].uuid in found.text


def _wait_for_unset(then):
    async def during(http, api, private):
        async with asyncio.timeout(10):
            while True:
                async with http.get(private + "/dashboard/state") as response:
                    engine = (await response.json())["status"]["models"][0]["engines"][0]
                if engine["unset"]:
                    break
                await asyncio.sleep(0.05)
        await then(http, api, private)

    return during


def test_gpus_that_are_not_here_are_an_error(tmp_path, machine):
    async def run():
        entry = EngineEntry(kind="openai", url="http://127.0.0.1:9", gpus=("5",))
        prepared = run_gateway(options(tmp_path, engines=(entry,)), tmp_path / "cache")
        await prepared.serving(lambda _: None)

    with pytest.raises(ValueError, match="5 is not here; here are 0 = GPU-"):
        asyncio.run(run())


@pytest.mark.parametrize("mode", ["dry-run", "off"])
def test_an_engine_that_is_started_gets_its_gpus_by_uuid_and_where_to_send_its_steps(tmp_path, machine, mode):
    port, log = free_port(), tmp_path / "state/engines"
    shows = "import os; print(*sorted(n + '=' + v for n, v in os.environ.items() if n[:5] in ('CUDA_', 'THROT')))"
    entry = EngineEntry(
        kind="openai",
        url=f"http://127.0.0.1:{port}",
        gpus=("0",),
        stats=str(tmp_path / "steps.sock"),
        command=shlex.join([sys.executable, "-c", shows]),
    )

    async def during(http, api, private):
        async with asyncio.timeout(20):
            while not any(file.stat().st_size for file in log.glob("*.log*")):
                await asyncio.sleep(0.01)

    lived(run_gateway(options(tmp_path, engines=(entry,), clocks=ClockOptions(mode=mode)), tmp_path / "cache"), during)
    shown = max((file.read_text() for file in log.glob("*.log*")), key=len)
    assert shown == (f"CUDA_VISIBLE_DEVICES={machine.gpus[0].uuid} THROTTLLEM_STATS={tmp_path / 'steps.sock'}\n")
