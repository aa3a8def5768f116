"""Which kind a board is: a table of what drivers report, and what must never be taken for what."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from throttllem.physics.catalogue import Catalogue
from throttllem.physics.recognition import Board, contradiction, recognise

CATALOGUE = Catalogue.load()
V100_CLOCKS = tuple(sorted({*range(135, 1531, 15), *range(142, 1523, 15)}))


def board(
    name: str, mib: float | None, top: int, limit_w: float | None, capability: str | None, low: int = 210, **more
):
    return Board(
        name=name,
        memory_bytes=None if mib is None else mib * 2**20,
        clocks_mhz=tuple(range(low, top + 1, 15)),
        limit_w=limit_w,
        compute_capability=capability,
        **more,
    )


LISTED = [
    (board("NVIDIA A100-SXM4-40GB", 40960, 1410, 400, "8.0"), "a100-40gb-sxm"),
    (board("A100-SXM4-40GB", 40536, 1410, 400, "8.0"), "a100-40gb-sxm"),
    (board("NVIDIA A100-PCIE-40GB", 40960, 1410, 250, "8.0"), "a100-40gb-pcie"),
    (board("NVIDIA A100-SXM4-80GB", 81920, 1410, 400, "8.0"), "a100-80gb-sxm"),
    (board("NVIDIA A100-SXM4-80GB", 81251, 1410, 275, "8.0"), "a100-80gb-sxm"),
    (board("NVIDIA A100 80GB PCIe", 81920, 1410, 300, "8.0"), "a100-80gb-pcie"),
    (board("NVIDIA H100 80GB HBM3", 81559, 1980, 700, "9.0", 345), "h100-80gb-sxm"),
    (board("NVIDIA H100 PCIe", 81559, 1755, 350, "9.0"), "h100-80gb-pcie"),
    (board("NVIDIA H100 NVL", 95830, 1785, 400, "9.0", 345), "h100-94gb-nvl"),
    (board("NVIDIA H200", 143771, 1980, 700, "9.0", 345), "h200-141gb-sxm"),
    (board("NVIDIA H200 NVL", 143771, 1785, 600, "9.0", 345), "h200-141gb-nvl"),
    (board("NVIDIA GH200 480GB", 97871, 1980, 900, "9.0", 345), "gh200-96gb"),
    (board("NVIDIA B200", 183359, 1965, 1000, "10.0", 120), "b200-180gb-sxm"),
    (board("NVIDIA L40S", 46068, 2520, 350, "8.9"), "l40s-48gb"),
    (board("NVIDIA L40S", 49140, 2520, 350, "8.9"), "l40s-48gb"),
    (board("NVIDIA L4", 23034, 2040, 72, "8.9"), "l4-24gb"),
    (board("NVIDIA A40", 46068, 1740, 300, "8.6"), "a40-48gb"),
    (board("NVIDIA A10", 23028, 1695, 150, "8.6"), "a10-24gb"),
    (board("NVIDIA A10G", 23028, 1710, 300, "8.6"), "a10g-24gb"),
    (board("NVIDIA GeForce RTX 4090", 24564, 3105, 450, "8.9"), "rtx-4090-24gb"),
    (board("NVIDIA RTX 6000 Ada Generation", 49140, 3105, 300, "8.9"), "rtx-6000-ada-48gb"),
    (board("Tesla T4", 15360, 1590, 70, "7.5", 300), "t4-16gb"),
    (board("Tesla T4", 15109, 1590, 70, "7.5", 300), "t4-16gb"),
    (board("Tesla V100-SXM2-16GB", 16160, 1530, 300, "7.0", 135), "v100-16gb-sxm2"),
    (board("Tesla V100-SXM2-32GB", 32768, 1530, 300, "7.0", 135), "v100-32gb-sxm2"),
    (board("Tesla V100-PCIE-32GB", 32510, 1380, 250, "7.0", 135), "v100-32gb-pcie"),
    (board("NVIDIA A100-SXM4-40GB", None, 1410, None, None), "a100-40gb-sxm"),
]
UNLISTED = [
    # an unknown name, the kind that it is modelled after, and a word of the reason
    (board("NVIDIA H20", 97871, 1980, 500, "9.0", 345), "gh200-96gb", "no GPU of the catalogue"),
    (board("NVIDIA H100 64GB HBM2e", 65247, 1980, 700, "9.0", 345), "h100-80gb-sxm", "no GPU of the catalogue"),
    (board("NVIDIA H100 80GB HBM3", 65247, 1980, 700, "9.0", 345), "h100-80gb-sxm", "has the name of h100-80gb-sxm"),
    (board("NVIDIA A100-SXM4-40GB", 81920, 1410, 400, "8.0"), "a100-80gb-sxm", "85.9 GB, not 42.5"),
    (board("NVIDIA A800-SXM4-80GB", 81920, 1410, 400, "8.0"), "a100-80gb-sxm", "no GPU of the catalogue"),
    (board("NVIDIA GeForce RTX 4090 D", 24564, 3105, 425, "8.9"), "rtx-4090-24gb", "no GPU of the catalogue"),
    (board("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97887, 3090, 600, "12.0", 180), "rtx-6000-ada-48gb",
     "the nearest architecture (8.9)"),
    (board("NVIDIA GB200", 189471, 2062, 1200, "10.0", 112), "b200-180gb-sxm", "no GPU of the catalogue"),
    (board("NVIDIA B300 SXM6 AC", 275040, 2032, 1100, "10.3", 127), "b200-180gb-sxm", "nearest architecture (10.0)"),
    (board("NVIDIA GeForce RTX 3090", 24576, 2100, 350, "8.6"), "a10g-24gb", "no GPU of the catalogue"),
    (board("Tesla P100-SXM2-16GB", 16280, 1480, 300, "6.0", 544), "v100-16gb-sxm2", "nearest architecture (7.0)"),
    (board("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4864, 1410, None, "8.0"), "a100-40gb-sxm", "slice (MIG)"),
    (board("GRID A100-10C", 10240, 1410, None, "8.0"), "a100-40gb-sxm", "no GPU of the catalogue"),
    (Board(name="NVIDIA Graphics Device"), None, "no GPU of the catalogue"),
    (Board(name='NVIDIA "X" 1\\ \n\x7f'), None, "none of its clocks reported"),
    (Board(name="Orin (nvgpu)", compute_capability="8.7"), None, "is a card: seconds and watts are a rough guess"),
    (Board(name="NVIDIA GB10", compute_capability="12.1", clocks_mhz=(208, 3003)), None, "2 of its clocks reported"),
    (board("a limit of 1 W", 46068, 2520, 1, "8.9"), "l40s-48gb", "taken from l40s-48gb: power limit"),
]  # fmt: skip


@pytest.mark.parametrize(("found", "kind"), LISTED, ids=lambda value: getattr(value, "text", value))
def test_a_listed_board_is_its_kind(found: Board, kind: str) -> None:
    it = recognise(found, CATALOGUE)
    assert (it.listed, it.gpu.name, it.note) == (True, kind, None)


def test_no_listed_board_is_taken_for_another_kind() -> None:
    for found, kind in LISTED:
        for other in CATALOGUE.gpus.values():
            refused = contradiction(found, other, CATALOGUE)
            assert (refused is None) == (other.name == kind), (found.name, other.name)
            assert refused is None or f"name {kind}" in refused


@pytest.mark.parametrize(("found", "like", "why"), UNLISTED, ids=lambda value: getattr(value, "text", None))
def test_an_unlisted_board_is_modelled_after_the_nearest_and_says_so(
    found: Board, like: str | None, why: str, tmp_path: Path
) -> None:
    it = recognise(found, CATALOGUE)
    assert not it.listed and it.gpu.name not in CATALOGUE.gpus
    assert like in (None, it.gpu.like)
    assert it.note and why in it.note and f"modelled after {it.gpu.like}" in it.note
    assert {it.gpu.time_basis.kind, it.gpu.power_basis.kind} == {"modelled"}
    for path in ("time.gemm_norm", "power.core_w"):
        assert it.gpu.origin_of(path) == f"modelled (inherited from {it.gpu.like})"
    assert it.gpu.origin_of("peak_flop_per_s") == f"modelled (scaled from {it.gpu.like})"
    if found.clocks_mhz:
        assert (it.gpu.clock_min_mhz, it.gpu.clock_max_mhz) == (found.clocks_mhz[0], found.clocks_mhz[-1])
    if found.limit_w and "MIG" not in found.name:
        assert it.gpu.power.limit_w == found.limit_w
    file = tmp_path / "mine.toml"
    file.write_text(it.entry())
    again = recognise(found, Catalogue.load(file))
    assert again.listed and again.gpu.name == it.gpu.name
    assert again.gpu.peak_fp8_flop_per_s == (
        it.gpu.peak_fp8_flop_per_s and pytest.approx(it.gpu.peak_fp8_flop_per_s, rel=1e-3)
    )


def test_facts_of_the_driver_make_the_entry() -> None:
    h20 = board("NVIDIA H20", 97871, 1980, 500, "9.0", 345, bandwidth_bytes_per_s=4.0e12, multiprocessors=78)
    gpu, like = recognise(h20, CATALOGUE).gpu, CATALOGUE.gpu("gh200-96gb")
    assert (gpu.name, gpu.bandwidth_bytes_per_s, gpu.multiprocessors) == ("h20-103gb", 4.0e12, 78)
    assert gpu.peak_flop_per_s == pytest.approx(like.peak_flop_per_s * 78 / 132)
    entry = recognise(h20, CATALOGUE).entry()
    assert "GUESSED" in entry and "UNKNOWN" not in entry
    assert len(tomllib.loads(entry)["gpu"]["h20-103gb"]) <= 12
    assert gpu.peak_fp8_flop_per_s == pytest.approx(like.peak_fp8_flop_per_s * 78 / 132)


def test_a_slice_has_its_share_of_the_whole_gpu() -> None:
    found = board("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 40192, 1410, 400, "8.0", multiprocessors=108)
    gpu, whole = recognise(found, CATALOGUE).gpu, CATALOGUE.gpu("a100-80gb-sxm")
    assert (gpu.like, gpu.multiprocessors) == (whole.name, 46)
    assert gpu.power.limit_w == pytest.approx(whole.power.limit_w * 3 / 7)
    assert gpu.bandwidth_bytes_per_s == pytest.approx(whole.bandwidth_bytes_per_s / 2, rel=0.03)
    assert "UNKNOWN" in recognise(found, CATALOGUE).entry()


def test_a_board_with_unified_memory_is_no_large_card() -> None:
    gpu = recognise(Board(name="Orin (nvgpu)", compute_capability="8.7"), CATALOGUE).gpu
    assert (gpu.bandwidth_bytes_per_s, gpu.power.limit_w) == (204.8e9, 60.0)
    assert gpu.origin_of("power.limit_w") == "modelled (as a Jetson AGX Orin of 64 GB)"


def test_clocks_that_alternate_between_two_steps_are_put_on_a_grid() -> None:
    volta = Board(name="Quadro GV100", clocks_mhz=V100_CLOCKS, compute_capability="7.0", memory_bytes=34e9)
    gpu = recognise(volta, CATALOGUE).gpu
    assert gpu.clock_step_mhz == 15 and set(gpu.clocks_mhz) <= set(V100_CLOCKS)


def test_a_kind_that_was_named_is_refused_or_kept() -> None:
    h200, a800 = LISTED[9][0], UNLISTED[4][0]
    assert contradiction(h200, CATALOGUE.gpu("h200-141gb-sxm"), CATALOGUE) is None
    refused = contradiction(h200, CATALOGUE.gpu("h100-80gb-sxm"), CATALOGUE)
    assert refused and "150.8 GB, not 85.5" in refused and "name h200-141gb-sxm" in refused
    assert contradiction(a800, CATALOGUE.gpu("a100-80gb-sxm"), CATALOGUE) is None
    refused = contradiction(a800, CATALOGUE.gpu("a100-40gb-sxm"), CATALOGUE)
    assert refused and "doctor" in refused and "l40s-48gb" in refused


def test_a_users_entry_of_the_same_board_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[gpu.mine]\nlike = "a100-40gb-sxm"\nnvml_names = ["NVIDIA A100-SXM4-40GB"]\n')
    catalogue = Catalogue.load(file)
    assert recognise(LISTED[0][0], catalogue).gpu.name == "mine"
    assert contradiction(LISTED[0][0], catalogue.gpu("a100-40gb-sxm"), catalogue) is None
