"""Real clients through the gateway on real engines: `make engines` installs them, `make test-real` runs this."""

import asyncio

import pytest

from tools.evaluation import identity, triton
from tools.evaluation.scoreboard import SMALL, errors_of, mixed, watched
from tools.testbed.engines.triton import MODEL
from tools.testbed.engines.triton import triton as triton_server
from tools.testbed.engines.vllm import vllm
from tools.testbed.gateway import gateway
from tools.testbed.known_clients import openai_figures, run_aiperf, run_bench_serve, run_openai, tokenizer_cache
from tools.testbed.report import ROOT, MissingError, Workspace
from tools.testbed.tap import tapped
from tools.testbed.trace import Sent, write_jobs, write_mooncake, write_timed_trace

pytestmark = pytest.mark.real
SENT = [Sent(at_s=n / 6, prompt_tokens=20 + 37 * n % 400, output_tokens=20 + 11 * n % 60) for n in range(24)]


def workspace_in(folder):
    return Workspace(engines=ROOT / ".engines", folder=folder, report=print)


def environment(workspace, name):
    try:
        return workspace.environment(name)
    except MissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    return environment(workspace_in(tmp_path_factory.mktemp("none")), "clients")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    workspace = workspace_in(tmp_path_factory.mktemp("vllm"))
    with vllm(environment(workspace, "vllm"), workspace.folder, flags=SMALL, report=print) as engine:
        yield engine


@pytest.fixture(scope="module")
def through(engine, tmp_path_factory):
    arguments = ("--engine", engine.url, "--slo-e2e", "60", "--slo-tbt", "1")
    with gateway(arguments, tmp_path_factory.mktemp("gateway")) as up:
        yield up.url


def test_answers_are_those_of_vllm(engine, tmp_path):
    with tapped(engine.url) as tap, gateway(("--engine", tap.url), tmp_path) as up:
        found = asyncio.run(identity.compare_all(identity.cases(), engine.url, up.url, tap, print))
    assert [each.as_dict() for each in found if not each.same] == []
    assert {each.case.name for each in found if each.same_bytes} >= {"chat, stream", "completion, echo"}


def test_the_openai_package_gets_every_token(through, clients, tmp_path):
    figures = openai_figures(run_openai(clients, through, write_jobs(mixed(SENT), tmp_path / "jobs"), concurrency=16))
    assert (figures.requests, figures.errors) == (len(SENT), 0)
    assert figures.ttft_p50_ms > 0


def test_vllm_bench_serve_replays_a_timed_trace(engine, through, tmp_path):
    trace = write_timed_trace(SENT, tmp_path / "trace.jsonl")
    figures = run_bench_serve(engine.environment, through, trace, engine.model, requests=len(SENT), folder=tmp_path)
    assert (figures.requests, figures.errors) == (len(SENT), 0)


def test_aiperf_replays_a_mooncake_trace(engine, through, clients, tmp_path):
    trace, cache = write_mooncake(SENT, tmp_path / "trace.jsonl"), tokenizer_cache(engine.model, tmp_path / "cache")
    figures = run_aiperf(clients, through, trace, cache, requests=len(SENT), folder=tmp_path / "out")
    assert (figures.requests, figures.errors) == (len(SENT), 0)


# Sequences and % of the KV capacity, far above what `make evaluation` finds: a machine that does other things is slow,
# and what it is slow with is on its way between engine and gateway.
@pytest.mark.parametrize(("plug_in", "sequences", "percent"), [(True, 2.0, 3.0), (False, 4.0, 6.0)])
def test_the_scoreboard_follows_the_engine(engine, clients, tmp_path, plug_in, sequences, percent):
    jobs = write_jobs(mixed(SENT), tmp_path / "jobs")
    samples = watched(engine, clients, jobs, tmp_path, plug_in=plug_in)
    errors = errors_of(samples, later=True)
    print(errors)
    assert len(samples) > 100
    assert max(sample["engine"]["running"] for sample in samples) > 1
    assert errors["running"]["mean"] < sequences
    assert errors["unexplained"]["mean"] < percent


def test_triton_serves_native_and_openai_clients(clients, tmp_path):
    server_environment = environment(workspace_in(tmp_path), "triton")
    with (
        triton_server(server_environment, tmp_path, triton.SPEED) as server,
        tapped(server.url) as tap,
        gateway(triton.arguments(server, tap.url), tmp_path / "gateway") as up,
    ):
        same = asyncio.run(identity.compare_all(triton.cases(), server.url, up.url, tap, print))
        jobs = write_jobs(triton.jobs(24), tmp_path / "jobs")
        figures = openai_figures(run_openai(clients, up.url, jobs, concurrency=8, model=MODEL))
    assert [each.as_dict() for each in same if not each.same] == []
    assert (figures.requests, figures.errors) == (24, 0)
