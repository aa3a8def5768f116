"""`throttllem simulate` and the commands beside it: errors that name a remedy, the JSON contract, runs that stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import run

SHORT = "poisson:rate=1,input=300,output=40,seconds=40"


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, cache_dir: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("THROTTLLEM_CACHE_DIR", str(cache_dir))
    monkeypatch.setenv("THROTTLLEM_WORKERS", "1")
    monkeypatch.chdir(tmp_path)


BAD = [
    (["--trace", "nowhere.csv"], ["nowhere.csv", "no such file"]),
    (["--trace", "azure-conv-lik"], ["did you mean azure-conv-like"]),
    (["--gpu", "a100-40gb-sx"], ["unknown GPU", "a100-40gb-sxm"]),
    (["--model", "llama-2-13"], ["unknown model", "llama-2-13b"]),
    (["--model", "llama-3-70b", "--tp", "2"], ["GiB", "smallest tp that fits is 4"]),
    (["--tp", "3"], ["40 heads", "3 GPUs"]),
    (["--engine", "vlm"], ["--engine: batching.engine = 'vlm'", "'vllm', 'tensorrt-llm' or 'sglang'"]),
    (["--sizes", "1,x"], ["--sizes 1,x", "1,2,4"]),
    (["--sizes", "1,2", "--tp", "4"], ["--tp and --sizes"]),
    (["--policy", "throttlem"], ["unknown policy", "'throttllem'"]),
    (["--policy", "fixed:1051"], ["210 to 1410 MHz in steps of 15"]),
    (["--policy", "triton+autoscale"], ["--sizes 1,2,4"]),
    (["--policy", ","], ["no policy given"]),
    (["--slo-e2e", "0"], ["--slo-e2e: slo.e2e_s = 0.0", "positive"]),
    (["--slo-tbt", "-1ms"], ["slo.tbt_s = -0.001", "positive"]),
    (["--slo-ttft", "nan"], ["slo.ttft_s = nan", "positive"]),
    (["--slo-ttft", "soon"], ["--slo-ttft: slo.ttft_s = 'soon'", "200ms"]),
    (["--length-error", "1.5"], ["--length-error: length.p95_error = 1.5", "between 0 and 0.99"]),
    (["--peak-rps", "fast"], ["--peak-rps fast"]),
    (["--peak-rps", "0"], ["peak rate 0"]),
    (["--seconds", "-3"], ["seconds = -3"]),
    (["--seconds", "long"], ["--seconds 'long'", "200ms"]),
    (["--set", "throttle.dwel_s=1"], ["throttle.dwell_s"]),
    (["--set", "throttle.dwell_s=soon"], ["--set: throttle.dwell_s = 'soon'", "number"]),
    (["--set", "throttle.policy=triton"], ["throttle.policy follows from policy"]),
    (["--set", "throttle.margin"], ["section.name=value"]),
    (["--lengths", "orakle"], ["--lengths: length.predictor = 'orakle'", "online"]),
    (["--lengths", "online", "--length-error", "0.3"], ["length.p95_error = 0.3", "only the oracle"]),
    (["--set", "throttle.replan_s=0"], ["throttle.replan_s = 0", "between 0.01"]),
    (["--set", "throttle.margin=5"], ["throttle.margin = 5"]),
    (["--set", "admission.patience=-1"], ["admission.patience = -1"]),
    (["--set", "autoscale.interval_s=0"], ["autoscale.interval_s = 0"]),
    (["--set", "engine.max_batch=0"], ["--set: batching.max_batch = 0"]),
    (["--set", "engine.block_tokens=0"], ["--set: batching.block_tokens = 0"]),
    (["--set", "noise.time=-1"], ["noise.time = -1"]),
    (["--set", "length.inflation=0"], ["length.inflation = 0"]),
    (["--policy", "triton,triton"], ["named twice"]),
    pytest.param(["--slo-tbt", "0.001", "--peak-rps", "max"], ["sustains no load"], marks=pytest.mark.slow),
    (["--trace", "poisson:rate=1,input=50000,output=9,seconds=20"], ["no request", "fits llama-2-13b"]),
    (["--json", "."], ["--json .", "folder"]),
    (["--out", "/dev/null/report"], ["/dev/null"]),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=" ".join)
def test_bad_input_is_refused_in_one_sentence(arguments, words, monkeypatch, capsys):
    trace = [] if "--trace" in arguments else ["--trace", SHORT]
    assert run(monkeypatch, "simulate", *trace, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert not list(Path.cwd().iterdir())


def test_json_follows_the_contract_and_the_seed(monkeypatch, capsys):
    texts = []
    for name in ("a.json", "b.json"):
        arguments = ["--trace", SHORT, "--policy", "triton,throttllem,least-energy,fixed:1050", "--json", name]
        assert run(monkeypatch, "simulate", *arguments) == 0
        content = json.loads(Path(name).read_text())
        for entry in content["runs"]:
            del entry["decision_s"]
        texts.append(json.dumps(content))
    assert texts[0] == texts[1]
    assert content["schema"] == 1
    assert content["scenario"]["seed"] == 0
    assert [entry["policy"] for entry in content["runs"]] == ["triton", "throttllem", "least-energy", "fixed:1050"]
    for entry in content["runs"]:
        assert entry["completed"] + entry["rejected"] == entry["requests"] > 20
        assert entry["tokens_per_joule"] == pytest.approx(entry["generated_tokens"] / entry["energy_j"])
        assert 0 < entry["idle_energy_j"] < entry["energy_j"]
        assert set(entry["e2e_s"]) == {"mean", "p50", "p90", "p95", "p99"}
        assert entry["slo"]["tbt_s"] == 0.2
        assert entry["sizes"] == [[0.0, 4]]
    assert content["runs"][3]["mean_clock_mhz"] == pytest.approx(1050, abs=60)
    assert content["runs"][0]["cost"]["kwh"] == pytest.approx(content["runs"][0]["energy_j"] / 3.6e6)
    assert content["basis"]["lengths"] == "online"
    read, _, first = capsys.readouterr().out.partition("\n")
    assert read.startswith(f"trace poisson: {content['scenario']['trace']['requests']} requests over ")
    assert first.startswith("Simulated") and "predicted online" in " ".join(first.split())[:200]


@pytest.mark.slow
def test_rates_above_capacity_run_and_report_the_violations(monkeypatch):
    overload = "poisson:rate=60,input=1500,output=150,seconds=20"
    assert run(monkeypatch, "simulate", "--trace", overload, "--slo-e2e", "10", "--json", "o.json") == 0
    for entry in json.loads(Path("o.json").read_text())["runs"]:
        assert entry["completed"] == entry["requests"]
        assert entry["slo"]["attainment"] < 0.9


def test_a_request_longer_than_the_context_is_rejected_with_the_reason(monkeypatch, capsys):
    Path("t.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01 00:00:00,100,20\n2024-01-01 00:00:01,9000,20\n"
    )
    assert run(monkeypatch, "simulate", "--trace", "t.csv", "--json", "o.json") == 0
    for entry in json.loads(Path("o.json").read_text())["runs"]:
        assert (entry["completed"], entry["rejected"]) == (1, 1)
        assert entry["slo"]["attainment"] == 0.5
    assert "1 of 2 requests were rejected: prompt + max_tokens exceeds the model's context" in " ".join(
        capsys.readouterr().out.split()
    )


def test_estimate_of_a_config_json(monkeypatch, capsys, tmp_path):
    config = {"model_type": "new", "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8}
    config |= {"intermediate_size": 4096, "vocab_size": 32000, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = ["estimate", "--model", str(tmp_path), "--tp", "1", "--clock", "1050", "--batch", "8", "--context", "500"]
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, *asked, "--kv-cache-dtype", "fp8") == 0
    assert "0.1998 billion parameters, 0.4 GB, 16.4 kB of KV cache a token" in capsys.readouterr().out
    assert run(monkeypatch, *asked, "--kv-cache-dtype", "int3") == 2
    assert "--kv-cache-dtype: batching.kv_cache_dtype = 'int3'" in capsys.readouterr().err


def test_estimate_answers_for_one_point(monkeypatch, capsys):
    assert run(monkeypatch, "estimate", "--clock", "1050", "--batch", "8", "--context", "500", "--json") == 0
    point = json.loads(capsys.readouterr().out)
    assert 0.005 < point["iteration_s"] < 0.05
    assert 300 < point["power_w"] < 1600
    assert {word.split(":")[0] for word in point["basis"].values()} <= {"measured", "calibrated", "modelled"}


@pytest.mark.slow
def test_profile_then_train(monkeypatch, capsys):
    assert run(monkeypatch, "profile", "p.parquet", "--tp", "4", "--rows", "3000") == 0
    assert run(monkeypatch, "train", "p.parquet", "--out", "model") == 0
    card = json.loads(Path("model/score_card.json").read_text())
    assert card["scores"]
    assert Path("model/table-tp4.npz").stat().st_size > 10_000
    assert "score_card.json in model" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_nothing_half_written(stop, cache_dir, tmp_path):
    arguments = ["simulate", "--trace", "azure-conv-like:seconds=3600", "--json", "a.json", "--out", "report"]
    environment = {**os.environ, "THROTTLLEM_CACHE_DIR": str(cache_dir), "THROTTLLEM_WORKERS": "2"}
    # A job in the background ignores Ctrl-C, and all that it starts would.
    command = ["env", "--default-signal=INT", str(Path(sys.executable).with_name("throttllem")), *arguments]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, stderr=subprocess.PIPE)
    time.sleep(6)
    assert process.poll() is None, process.stderr.read()
    process.send_signal(stop)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_one_configuration_for_every_command(monkeypatch):
    """A file and variables of `serve` set the simulation's options too."""
    Path("t.toml").write_text("[server]\nport = 8001\n[slo]\ne2e_s = '7s'\n[batching]\nmax_batch = 8\n")
    monkeypatch.setenv("THROTTLLEM_NOISE__TIME", "0")
    arguments = ["--trace", SHORT, "--policy", "triton", "--config", "t.toml", "--set", "throttle.margin=0.1"]
    assert run(monkeypatch, "simulate", *arguments, "--json", "a.json") == 0
    scenario = json.loads(Path("a.json").read_text())["scenario"]
    assert scenario["slo"] == {"e2e_s": 7.0, "tbt_s": 0.2, "ttft_s": None, "attainment": 0.99, "batch": False}
    options = scenario["options"]
    assert set(options) == {"throttle", "admission", "autoscale", "length", "batching", "noise", "faults", "cost"}
    assert (options["batching"]["max_batch"], options["noise"]["time"], options["throttle"]["margin"]) == (8, 0, 0.1)


def test_a_pool_begins_with_the_engines_asked_for_and_keeps_them(monkeypatch):
    arguments = ["--trace", SHORT, "--policy", "triton", "--slo-e2e", "30", "--sizes", "2,4", "--gpus", "9"]
    assert run(monkeypatch, "simulate", *arguments, "--engines", "2:2,4:1", "--json", "a.json") == 0
    found = json.loads(Path("a.json").read_text())
    assert found["runs"][0]["engines"] == [[0.0, {"2": 2, "4": 1}]]
    assert (found["scenario"]["gpus"], found["scenario"]["engines_at_start"]) == (9, {"2": 2, "4": 1})


@pytest.mark.parametrize("engines", ["2", "2:0", "2:1,2:1", "a:b", "2:1:1", ""])
def test_engines_that_are_none_are_an_error(monkeypatch, capsys, engines):
    assert run(monkeypatch, "simulate", "--trace", SHORT, "--gpus", "8", "--engines", engines) != 0
    assert "must be sizes and how many of each, as in 1:4,2:1" in capsys.readouterr().err


def test_a_former_name_is_noted(monkeypatch, capsys):
    arguments = ["--trace", SHORT, "--policy", "triton", "--set", "engine.max_batch=8", "--slo-e2e", "9"]
    assert run(monkeypatch, "simulate", *arguments) == 0
    assert "note: --set: engine.max_batch is now called batching.max_batch\n" in capsys.readouterr().err
