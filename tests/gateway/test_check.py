"""`serve --check`: what the gateway would do with good, bad and unreachable configurations; it changes nothing."""

import asyncio
import re
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gateway.fakes import Engine, engine_server
from gateway.test_build import A100, built, trained
from throttllem.config import EngineEntry, Options, RecorderOptions, ServerOptions
from throttllem.core.forecast.performance_table import Calibrated
from throttllem.core.types import Slo
from throttllem.gateway.check import Finding, check_configuration, open_doors, verdict
from throttllem.profiling.storage import load_table, save_table


def found(tmp_path, origins=None, **options):
    """The findings; nothing may be left behind."""
    options.setdefault("server", ServerOptions(port=0))
    options.setdefault("state_dir", tmp_path / "state")
    before = sorted(tmp_path.rglob("*"))
    findings = asyncio.run(check_configuration(Options(**options), origins or {}, tmp_path / "cache"))
    assert sorted(tmp_path.rglob("*")) == before
    return findings


def text_of(findings):
    return "\n".join(f"{finding.mark} {finding.text}" for finding in findings)


def test_what_the_defaults_would_do(tmp_path):
    findings = found(tmp_path, {"slo.e2e_s": "x.toml:3"}, slo=Slo(e2e_s=9.0))
    text = text_of(findings)
    assert not any(finding.fatal for finding in findings)
    assert "ok slo.e2e_s = 9.0   (x.toml:3)" in text
    assert "would listen on 127.0.0.1:0" in text
    assert "every client on this machine is served" in text
    assert f"stored in {tmp_path / 'state'}" in text
    assert "SLO by default: E2E 9 s" in text
    assert "policy least-energy would choose among 81 clocks, 210 to 1410 MHz, of a simulated a100-40gb-sxm" in text
    assert "its performance table is trained at the first start" in text
    assert "clocks are simulated: it names no GPUs (engines.N.gpus, --gpus)" in text


@pytest.mark.parametrize(
    ("policy", "chosen"), [("triton", "would keep to the top clock of"), ("fixed:1005", "would keep to 1005 MHz of")]
)
def test_a_policy_that_chooses_no_clock(tmp_path, policy, chosen):
    assert f"policy {policy} {chosen} a simulated a100-40gb-sxm" in text_of(found(tmp_path, policy=policy))


def test_a_calibrated_table_reserves_its_own_error(tmp_path):
    trained(tmp_path)
    file = tmp_path / "table-tp1.npz"
    basis = Calibrated(clocks_mhz=(495, 885, 1410), seconds_error=0.12, watts_error=0.2)
    above = tuple(mhz for mhz in A100 if mhz >= 495)
    plain = load_table(file)
    some = {name: getattr(plain, name)[:, -len(above) :] for name in ("seconds", "watts")}
    save_table(replace(plain, clocks_mhz=above, calibrated=basis, **some), file)
    (served,) = built(tmp_path, engines=(EngineEntry(tables=tmp_path),)).models.served
    options = served.loop.controller.options
    assert (options.throttle.margin, options.admission.margin) == (0.12, 0.12)
    text = text_of(found(tmp_path, engines=(EngineEntry(tables=tmp_path),)))
    assert "calibrated on a quick profile at 495, 885, 1410 MHz, not measured at every clock" in text
    assert "choose among 62 clocks, 495 to 1410 MHz" in text
    assert "12.0%" in text and "no clock below 495 MHz" in text


def test_the_papers_policy_is_warned_of_where_the_lowest_clock_costs_more(tmp_path):
    trained(tmp_path)
    file = tmp_path / "table-tp1.npz"
    plain = load_table(file)
    save_table(replace(plain, watts=np.full_like(plain.watts, 200.0)), file)
    engines = (EngineEntry(tables=tmp_path),)
    (warning,) = [each for each in found(tmp_path, engines=engines, policy="throttllem") if "more energy" in each.text]
    assert warning.mark == "--" and "least-energy takes the cheapest" in warning.text
    assert re.search(r"up to \d+% more energy than the maximum clock between \S+ and \S+ requests/s", warning.text)
    assert "more energy" not in text_of(found(tmp_path, engines=engines, policy="least-energy"))


def test_a_port_that_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        findings = found(tmp_path, server=ServerOptions(port=port))
    (fatal,) = [finding for finding in findings if finding.fatal]
    assert fatal.text == f"server.port = {port}: cannot listen on 127.0.0.1:{port}: Address already in use"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    findings = found(tmp_path, state_dir=tmp_path / "file" / "state")
    (fatal,) = [finding for finding in findings if finding.fatal]
    assert "state_dir: cannot write" in fatal.text
    assert "a file stands where a folder is needed" in fatal.text


def test_what_cannot_be_built_is_fatal(tmp_path):
    findings = found(tmp_path, engines=(EngineEntry(tp=3),))
    assert [finding.fatal for finding in findings].count(True) == 1
    assert findings[-1].fatal


def test_an_engine_that_is_not_there_is_waited_for(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    entry = EngineEntry(kind="openai", url=f"http://127.0.0.1:{port}")
    findings = found(tmp_path, engines=(entry,))
    text = text_of(findings)
    assert not any(finding.fatal for finding in findings)
    assert f"!! engine openai-tp1: the engine at http://127.0.0.1:{port} cannot be reached" in text
    assert "serve would wait for it" in text
    assert "has no performance table: the clock stays at its maximum" in text


def test_an_engine_that_is_something_else(tmp_path):
    async def run():
        async with engine_server(Engine()) as url:
            entry = EngineEntry(kind="openai", url=url, tables=trained(tmp_path))
            options = Options(server=ServerOptions(port=0), state_dir=tmp_path, engines=(entry,))
            return await check_configuration(options, {}, tmp_path)

    text = text_of(asyncio.run(run()))
    assert "!! engine openai-tp1: " in text
    assert "has no performance table" not in text


def test_which_clients_are_served_and_what_is_recorded(tmp_path):
    text = text_of(found(tmp_path, server=ServerOptions(host="0.0.0.0", port=0)))
    assert "!! no API keys, and 0.0.0.0 is not loopback" in text
    assert "flight recorder: " in text
    assert not list(open_doors(ServerOptions(host="127.0.0.2", metrics_port=0, metrics_host="::1")))
    (door,) = open_doors(ServerOptions(metrics_port=0, metrics_host="metrics.example", api_keys=("a",)))
    assert "metrics.example is not loopback: every client that reaches it sees metrics" in door
    server = ServerOptions(port=0, metrics_port=0, api_keys=("a", "b"))
    text = text_of(
        found(tmp_path, server=server, recorder=RecorderOptions(enabled=False), classes={"gold": Slo(tbt_s=0.1)})
    )
    assert "2 API keys" in text
    assert "metrics and dashboard on 127.0.0.1:0" in text
    assert "SLO class gold: TBT 0.1 s" in text
    assert "flight recorder" not in text


def test_the_exit_code_follows_from_the_marks():
    fine, known = Finding(mark="ok", text=""), Finding(mark="--", text="")
    wrong, fatal = Finding(mark="!!", text=""), Finding(mark="!!", text="", fatal=True)
    assert verdict([fine, known]) == (0, "nothing to correct")
    assert verdict([fine, wrong, known, wrong]) == (1, "2 to correct; serve would start all the same")
    assert verdict([wrong, fatal]) == (2, "2 to correct; serve would not start")


def test_folders_that_others_can_write_to_and_keys_that_they_can_read_are_named(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o1777)
    file = tmp_path / "x.toml"
    file.write_text("")
    file.chmod(0o644)
    text = text_of(found(tmp_path, {"engines.0.api_key": f"{file}:3", "server.port": f"{file}:1"}))
    assert f"!! cache_dir: {tmp_path / 'cache'} can be written by other users (mode 0777): chmod go-w" in text
    assert f"!! state_dir: {tmp_path / 'state'} can be written by other users (mode 1777)" in text
    assert f"!! {file} holds keys, and other users can read or write it (mode 0644): chmod 600 {file}" in text
    file.chmod(0o600)
    assert "holds keys" not in text_of(found(tmp_path, {"engines.0.api_key": f"{file}:3"}))
    file.unlink()
    assert "holds keys" not in text_of(found(tmp_path, {"engines.0.api_key": f"{file}:3"}))


def test_step_reports_that_cannot_be_received_are_named_before_the_engine_is_up(tmp_path):
    def text(**entry):
        engine = EngineEntry(kind="openai", url="http://127.0.0.1:9", **entry)
        return text_of(found(tmp_path, engines=(engine,)))

    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert f"!! engines.0.stats: other users can write in its folder {tmp_path}/open" in text(
        stats=f"{tmp_path}/open/steps"
    )
    assert "!! engines.0.stats: the secret of step reports, /none" in text(
        stats="127.0.0.1:9", stats_secret=Path("/none")
    )
    assert "engines.0.stats:" not in text(stats=f"{tmp_path}/made/later/steps")
