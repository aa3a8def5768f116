"""`throttllem calibrate` as a user meets it: from a profile to an entry that other commands take, or one sentence."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from calibrate.synthetic import LIKE, MODEL, changed_gpu, frame, measure
from command import run
from hypothesis import given, settings
from hypothesis import strategies as st

from throttllem.calibrate.calibration import Calibration
from throttllem.calibrate.entry import basis, entry
from throttllem.cli.commands.calibrate import calibrate
from throttllem.physics.catalogue import Catalogue
from throttllem.physics.engine import EnginePhysics
from throttllem.profiling.profile import read_profile, write_profile


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("THROTTLLEM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("THROTTLLEM_WORKERS", "1")
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.chdir(tmp_path)


def write_catalogue(name: str, path: Path, seed: int | None = None, **changed: int) -> None:
    """The test's GPU (a coarse ladder of clocks makes fits fast), with changed constants where there is a seed."""
    gpu = (LIKE if seed is None else changed_gpu(seed)[0]).model_copy(update=changed)
    known = Calibration(gpu=gpu, like=LIKE.name, fitted=(), scores=(), rows=1, rows_fitted=1)
    path.write_text(entry(known, name, basis(measure(LIKE), MODEL.name, "test")))


def test_profile_calibrate_estimate_simulate(monkeypatch, capsys):
    write_catalogue("real-gpu", Path("real.toml"), seed=4)
    write_catalogue("known-gpu", Path("known.toml"))
    engine = ("--gpu", "real-gpu", "--model", MODEL.name, "--tp", "1")
    assert run(monkeypatch, "profile", "p.csv", *engine, "--rows", "45", "--catalogue", "real.toml") == 0
    fit = ("calibrate", "p.csv", "--out", "my.toml", "--name", "my-gpu")
    assert run(monkeypatch, *fit, "--like", "known-gpu", "--catalogue", "known.toml") == 0
    said = capsys.readouterr().out
    for words in (
        "held out",
        "nothing",
        "bands of clocks",
        "bands of batch sizes",
        "power.core_w",
        "no, that of known-gpu",
    ):
        assert words in said
    mine = Catalogue.load(Path("my.toml")).gpu("my-gpu")
    true = Catalogue.load(Path("real.toml")).gpu("real-gpu")
    for asked in ((1410, 10, 6000, 0, 0.0), (660, 60, 30000, 0, 0.0), (960, 30, 10000, 700, 245e3)):
        got, wanted = (EnginePhysics(gpu, MODEL, 1).iteration(*asked) for gpu in (mine, true))
        assert got == pytest.approx(wanted, rel=0.08)
    own = ("--gpu", "my-gpu", "--model", MODEL.name, "--tp", "1", "--catalogue", "my.toml")
    assert run(monkeypatch, "estimate", *own, "--clock", "960", "--batch", "8", "--context", "500") == 0
    assert "calibrated: fitted to p.csv, 51 rows" in capsys.readouterr().out
    trace = ("--trace", "poisson:rate=1,input=300,output=20,seconds=20")
    assert run(monkeypatch, "simulate", *own, *trace, "--policy", "triton,fixed:960", "--slo-e2e", "30") == 0
    assert "fixed:960" in capsys.readouterr().out


def test_a_model_of_ones_own_is_written_beside_the_gpu(monkeypatch, capsys):
    write_catalogue("known-gpu", Path("known.toml"))
    known = MODEL.model_dump(exclude={"name", "huggingface"}, exclude_defaults=True)
    fields = known | {"layers": 30, "weights": '"fp8"'}
    fields["experts"] = "{count = 4, active = 2, intermediate = 4096}"
    with Path("known.toml").open("a") as known:
        known.write("\n".join(["[model.my-model]", *(f"{key} = {value}" for key, value in fields.items())]))
    own = Catalogue.load(Path("known.toml")).model("my-model")
    points = measure(LIKE, clocks=(405, 900, 1410), batches=(2, 32), sizes=(1,), model=own)
    write_profile(frame(points, gpu="known-gpu", model="my-model"), Path("p.csv"))
    assert run(monkeypatch, "calibrate", "p.csv", "--out", "my.toml", "--catalogue", "known.toml") == 0
    found = Catalogue.load(Path("my.toml"))
    assert found.model("my-model") == own
    assert found.gpu("known-gpu").time_basis.models == ("my-model",)


BAD = [
    (["--like", "a100-40gb-sx"], ["unknown GPU", "did you mean a100-40gb-sxm"]),
    ([], ["its GPU 'new-gpu' is not in the catalogue", "--like", "a100-40gb-sxm"]),
    (["--like", LIKE.name, "--name", "my gpu"], ["--name my gpu", "letters, digits"]),
    (["--like", LIKE.name, "--out", "."], ["--out .: is a folder"]),
    (["--like", LIKE.name, "--catalogue", "nowhere.toml"], ["nowhere.toml: cannot be read"]),
    (["--like", "slow", "--catalogue", "slow.toml"], ["p.csv, line", "1410 MHz, and slow runs at 210 to 1260 MHz"]),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(arguments) or "no --like" for arguments, _ in BAD])
def test_refusals_are_one_sentence_and_write_nothing(arguments, words, monkeypatch, capsys):
    write_profile(frame(measure(LIKE)), Path("p.csv"))
    write_catalogue("slow", Path("slow.toml"), clock_max_mhz=1260)
    out = [] if "--out" in arguments else ["--out", "my.toml"]
    assert run(monkeypatch, "calibrate", "p.csv", *out, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    for word in words:
        assert word in error
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["p.csv", "slow.toml"]


def small_profile(
    path: str = "p.csv", clocks: tuple[int, ...] = (405, 900, 1410), watts: float = 1.0, tp: int = 1
) -> None:
    points = measure(LIKE, clocks=clocks, batches=(2, 32), sizes=(tp,))
    write_profile(frame([point._replace(watts=point.watts * watts) for point in points], gpu="coarse"), Path(path))


@pytest.mark.parametrize("out", ["p.csv", "./p.csv", "link.toml", "coarse.toml"])
def test_what_is_read_is_not_overwritten(out, monkeypatch, capsys):
    small_profile()
    write_catalogue("coarse", Path("coarse.toml"))
    Path("link.toml").symlink_to("p.csv")
    before = [Path(name).read_bytes() for name in ("p.csv", "coarse.toml")]
    assert run(monkeypatch, "calibrate", "p.csv", "--out", out, "--catalogue", "coarse.toml") == 2
    assert "name another file" in capsys.readouterr().err
    assert [Path(name).read_bytes() for name in ("p.csv", "coarse.toml")] == before


def test_folders_are_made_only_for_what_is_written(monkeypatch, capsys):
    write_catalogue("coarse", Path("coarse.toml"))
    small_profile("bad.csv", clocks=(405, 900))
    new = ("--out", "new/dir/a.toml", "--catalogue", "coarse.toml")
    assert run(monkeypatch, "calibrate", "bad.csv", *new) == 2
    assert "2 of the 3 distinct clocks" in capsys.readouterr().err and not Path("new").exists()
    small_profile()
    assert run(monkeypatch, "calibrate", "p.csv", *new) == 0
    assert set(Catalogue.load(Path("new/dir/a.toml")).gpus) >= {"coarse"}
    assert run(monkeypatch, "calibrate", "p.csv", "--out", "p.csv/a.toml", "--catalogue", "coarse.toml") == 2
    assert "a file stands where a folder is needed" in capsys.readouterr().err


@pytest.mark.slow
def test_doubts_are_printed_and_written(monkeypatch, capsys):
    write_catalogue("coarse", Path("coarse.toml"))
    small_profile(watts=0.5, tp=2)
    assert run(monkeypatch, "calibrate", "p.csv", "--out", "one.toml", "--catalogue", "coarse.toml") == 0
    for told in (capsys.readouterr().err.splitlines(), Path("one.toml").read_text().splitlines()):
        assert any("warning: at tp 2" in line.lower() and line.endswith("watts of one GPU?") for line in told)
    assert run(monkeypatch, "calibrate", "p.csv", "--out", "two.toml", "--catalogue", "one.toml") == 0
    assert "warning: coarse was itself fitted to p.csv" in capsys.readouterr().err


def test_an_unknown_model_is_told_how_to_be_added(monkeypatch, capsys):
    write_profile(frame(measure(LIKE), gpu=LIKE.name, model="my-model"), Path("p.csv"))
    assert run(monkeypatch, "calibrate", "p.csv", "--out", "my.toml") == 2
    error = capsys.readouterr().err
    assert "unknown model 'my-model'" in error and "[model.NAME]" in error and "--catalogue" in error


FEW = frame(measure(LIKE, clocks=(405, 900, 1410), batches=(2, 32), sizes=(1,)), gpu="coarse").write_csv().splitlines()
CELLS = st.one_of(
    st.sampled_from(["", "0", "-1", "1e300", "nan", "inf", "abc", "1.5", "5e-324", "9007199254740992", '"', "1410"]),
    st.floats(allow_nan=False).map(str),
    st.integers(0, 5000).map(str),
)  # fmt: skip
CHANGES = st.lists(st.tuples(st.integers(0, len(FEW) - 1), st.integers(0, 9), CELLS), max_size=3)


def changed_csv(changes: list[tuple[int, int, str]], dropped: set[int]) -> str:
    lines = [line.split(",") for line in FEW]
    for line, column, text in changes:
        lines[line][column] = text
    return "\n".join(",".join(line) for number, line in enumerate(lines) if number not in dropped)


GARBAGE = st.one_of(
    st.text(max_size=60),
    st.builds(changed_csv, CHANGES, st.sets(st.integers(1, len(FEW) - 1), max_size=20)),
)


@pytest.mark.slow
@settings(max_examples=8)
@given(GARBAGE)
def test_whatever_the_csv_an_error_and_no_file_or_a_loadable_entry(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("garbage")
    write_catalogue("coarse", folder / "coarse.toml")
    (folder / "p.csv").write_bytes(text.encode("utf-8", "surrogatepass"))
    out = folder / "my.toml"
    try:
        calibrate(folder / "p.csv", out, name="mine", like="coarse", catalogue=folder / "coarse.toml")
    except (ValueError, OSError) as error:
        assert str(error)
        assert sorted(path.name for path in folder.iterdir()) == ["coarse.toml", "p.csv"]
    else:
        gpu = Catalogue.load(out).gpu("mine")
        profiled = read_profile(folder / "p.csv")
        assert gpu.time_basis.clock_max_mhz == profiled["clock_mhz"].max()
        assert isinstance(profiled, pl.DataFrame) and profiled.height >= 15
