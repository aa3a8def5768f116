"""The kind of an engine's GPUs, read through the fake NVML."""

import re
from pathlib import Path

import pytest

from throttllem.gpu.boards.facts import boards_here, kind_of, knowing
from throttllem.gpu.nvml import NvmlError
from throttllem.physics.catalogue import Catalogue, UnknownName
from throttllem.physics.recognition import recognise
from tools.nvml.machine import a100, h100
from tools.nvml.part import catalogue_parts

CATALOGUE = Catalogue.load()
H20 = h100(1, name="NVIDIA H20", limit_w=500.0, cores=9984)


def test_the_kind_of_boards_is_taken_where_none_is_named(make_gpus_here):
    make_gpus_here(*a100(2))
    kind = kind_of(("0", "1"), None, CATALOGUE)
    assert (kind.gpu.name, kind.notes) == ("a100-40gb-sxm", ())


def test_every_kind_of_the_catalogue_is_read_back(make_gpus_here):
    names = sorted(CATALOGUE.gpus)
    for some in (names[:12], names[12:]):
        parts = [catalogue_parts(name, 1, uuid=f"GPU-{name}", tp=2)[0] for name in some]
        make_gpus_here(*parts, name=some[0])
        boards = boards_here([part.uuid for part in parts])
        found = [recognise(board, CATALOGUE) for board in boards.values()]
        assert [one.gpu.name for one in found] == some and all(one.listed for one in found)
        for one in found:
            assert one.board.multiprocessors == one.gpu.multiprocessors
            assert one.board.bandwidth_bytes_per_s == pytest.approx(one.gpu.bandwidth_bytes_per_s, rel=0.01)


def test_a_kind_that_contradicts_the_board_is_refused_or_a_warning(make_gpus_here):
    make_gpus_here(*a100(1))
    text = (
        r"GPU 0: NVIDIA A100-SXM4-40GB .* is not a100-80gb-sxm: 42.5 GB, not 85.9; leave --gpu out, or name a100-40gb"
    )
    with pytest.raises(ValueError, match=text):
        kind_of(("0",), "a100-80gb-sxm", CATALOGUE)
    kind = kind_of(("0",), "a100-80gb-sxm", CATALOGUE, only_warn=True)
    assert kind.gpu.name == "a100-80gb-sxm" and re.search(text, kind.notes[0])
    with pytest.raises(UnknownName, match=r"l40s-48gb.*`throttllem doctor`"):
        kind_of(("0",), "a100-80", CATALOGUE)


def test_an_unlisted_board_has_a_kind_and_a_note(make_gpus_here):
    make_gpus_here(*H20)
    kind = kind_of(("0",), None, CATALOGUE)
    assert (kind.gpu.name, kind.gpu.like, kind.gpu.power.limit_w) == ("h20-86gb", "h100-80gb-sxm", 500.0)
    assert "modelled after h100-80gb-sxm" in kind.notes[0]
    named = kind_of(("0",), "h100-80gb-sxm", CATALOGUE)
    assert named.gpu.name == "h100-80gb-sxm" and "used as h100-80gb-sxm, as named" in named.notes[0]


def test_a_profile_of_an_unlisted_board_is_understood_on_its_machine(make_gpus_here):
    machine = make_gpus_here(*H20)
    assert knowing(CATALOGUE, "h20-86gb").gpu("h20-86gb").like == "h100-80gb-sxm"
    assert knowing(CATALOGUE, "l40s-48gb") is CATALOGUE
    machine.driver(False)
    assert knowing(CATALOGUE, "h20-86gb") is CATALOGUE


def test_users_entries_are_recognised(make_gpus_here, tmp_path: Path):
    make_gpus_here(*H20)
    file = tmp_path / "mine.toml"
    file.write_text('[gpu.mine]\nlike = "h100-80gb-sxm"\nnvml_names = ["NVIDIA H20"]\nlimit_w = 500\n')
    kind = kind_of(("0",), None, Catalogue.load(file))
    assert (kind.gpu.name, kind.notes) == ("mine", ())


def test_without_a_driver_there_is_no_board(make_gpus_here):
    make_gpus_here(*a100(1)).driver(False)
    with pytest.raises(NvmlError, match="load the NVIDIA driver"):
        boards_here()
