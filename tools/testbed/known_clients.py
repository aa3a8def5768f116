"""Clients that others wrote, run as their users would: `openai`, `vllm bench serve`, `aiperf`. They return figures.

Each runs without network in the environment that its package is installed in. Raises ProcessError if it fails.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.testbed.engines.vllm import ENVIRONMENT, MODEL
from tools.testbed.figures import Figures, percentiles_ms
from tools.testbed.processes import completed

REPOSITORY = "local/tiny"
COMMIT = "0" * 40


def run_openai(clients: Path, url: str, jobs: Path, *, concurrency: int, model: str = MODEL) -> Mapping[str, Any]:
    """The `openai` package: what `openai_client.py` prints."""
    script = Path(__file__).with_name("openai_client.py")
    # -P: the modules beside the script are not its own.
    command = [str(clients / "bin/python"), "-P", str(script), url, model, str(jobs), str(concurrency)]
    found: Mapping[str, Any] = json.loads(_run(command))
    return found


def openai_figures(found: Mapping[str, Any]) -> Figures:
    """Figures of such a run; a request with another number of tokens than it asked for is an error."""
    good = [one for one in found["requests"] if "error" not in one and one["tokens"] == one["wanted"]]
    streams = [one for one in good if one["stream"]]
    ttft = percentiles_ms([one["ttft_s"] for one in streams])
    itl = percentiles_ms([gap for one in streams for gap in one["gaps_s"]])
    means = [(one["e2e_s"] - one["ttft_s"]) / (one["tokens"] - 1) for one in streams if one["tokens"] > 1]
    return Figures(
        requests=len(good),
        errors=len(found["requests"]) - len(good),
        ttft_p50_ms=ttft[0],
        ttft_p99_ms=ttft[1],
        itl_p50_ms=itl[0],
        itl_p99_ms=itl[1],
        tpot_p50_ms=percentiles_ms(means)[0],
        tokens_per_s=sum(one["tokens"] for one in good) / found["wall_s"],
    )


def run_bench_serve(vllm: Path, url: str, trace: Path, model: Path, *, requests: int, folder: Path) -> Figures:
    """`vllm bench serve` with a timed trace."""
    result = folder / "bench.json"
    command = [
        *(str(vllm / "bin/vllm"), "bench", "serve", "--backend", "vllm", "--base-url", url),
        *("--endpoint", "/v1/completions", "--model", MODEL, "--tokenizer", str(model), "--num-prompts", str(requests)),
        *("--dataset-name", "timed_trace", "--dataset-path", str(trace), "--timed-trace-sec-multiplier", "0.001"),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99", "--temperature", "0"),
        *("--save-result", "--result-dir", str(folder), "--result-filename", result.name, "--disable-tqdm"),
    ]
    _run(command)
    found = json.loads(result.read_text())
    return Figures(
        requests=found["completed"],
        errors=found["failed"],
        ttft_p50_ms=found["p50_ttft_ms"],
        ttft_p99_ms=found["p99_ttft_ms"],
        itl_p50_ms=found["p50_itl_ms"],
        itl_p99_ms=found["p99_itl_ms"],
        tpot_p50_ms=found["p50_tpot_ms"],
        tokens_per_s=found["output_throughput"],
    )


def run_aiperf(
    clients: Path,
    url: str,
    trace: Path,
    cache: Path,
    *,
    requests: int,
    folder: Path,
    telemetry: Sequence[str] = ("--no-gpu-telemetry",),
    environment: Mapping[str, str] | None = None,
) -> Figures:
    """`aiperf profile` with a Mooncake trace on a fixed schedule; `cache` holds the tokenizer (`tokenizer_cache`).

    What became of each request is in `folder`, with readings of the GPUs if `telemetry` asks for them; `environment`
    makes it see them.
    """
    command = [
        *(str(clients / "bin/aiperf"), "profile", "--model", MODEL, "--url", url, "--tokenizer", REPOSITORY),
        *("--endpoint-type", "completions", "--streaming", "--use-server-token-count", "--use-legacy-max-tokens"),
        *("--input-file", str(trace), "--custom-dataset-type", "mooncake_trace", "--fixed-schedule"),
        *("--extra-inputs", "ignore_eos:true", "--extra-inputs", "temperature:0", "--random-seed", "0"),
        *(*telemetry, "--no-server-metrics", "--ui", "none", "--output-artifact-dir", str(folder)),
        *("--workers-max", "1", "--record-processors", "1"),
    ]
    _run(command, {"HF_HOME": str(cache), **(environment or {})})
    found = json.loads((folder / "profile_export_aiperf.json").read_text())
    done = int(found["request_count"]["avg"])
    # Its "inter token latency" is a mean per request; its chunks are what others call inter-token latency.
    return Figures(
        requests=done,
        errors=requests - done,
        ttft_p50_ms=found["time_to_first_token"]["p50"],
        ttft_p99_ms=found["time_to_first_token"]["p99"],
        itl_p50_ms=found["inter_chunk_latency"]["p50"],
        itl_p99_ms=found["inter_chunk_latency"]["p99"],
        tpot_p50_ms=found["inter_token_latency"]["p50"],
        tokens_per_s=found["output_token_throughput"]["avg"],
    )


def tokenizer_cache(model: Path, folder: Path) -> Path:
    """A Hugging Face home that holds the model's tokenizer under `REPOSITORY`: aiperf takes no folder."""
    there = folder / f"hub/models--{REPOSITORY.replace('/', '--')}"
    snapshot = there / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (there / "refs").mkdir()
    (there / "refs/main").write_text(COMMIT)
    for file in (*model.glob("*.json"), *model.glob("*.jinja")):
        shutil.copy(file, snapshot)
    return folder


def _run(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> str:
    # The hashes of text seed the prompts of `vllm bench serve`.
    return completed(command, environment={**ENVIRONMENT, "PYTHONHASHSEED": "0", **(environment or {})})[0]
