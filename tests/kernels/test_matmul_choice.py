"""How a matmul is chosen and launched: rows by layout, epilogue and size, the derived tile, and one line of why."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tune_matmul
from benchmarks.matmul_shapes import MODELS, TOKENS, Shape, linears, shapes
from tests.kernels.matmul_cases import matrix
from tpformer_kernels import matmul_choice, tables
from tpformer_kernels.matmul_choice import choose, derived_tile, faster_by_kernel, key_of, kind_of, table

CPU = torch.device("cpu")
BF16 = torch.bfloat16
OPTIONS = {"BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "SLICES", "num_warps", "num_stages"}
TILES = {
    "half pointers": {"narrow": {"BLOCK_M": 64, "BLOCK_N": 64}, "wide": {"BLOCK_M": 128, "BLOCK_N": 128}},
    "ieee pointers": {"exact": {"BLOCK_M": 64, "BLOCK_N": 64}},
}


def pretend(monkeypatch: pytest.MonkeyPatch, rows: dict[str, Any], tiles: dict[str, Any] = TILES) -> None:
    """A table with these rows."""
    monkeypatch.setattr(matmul_choice, "table", lambda architecture: {"tiles": tiles, "shapes": rows})


@pytest.mark.parametrize(("speedup", "backend"), [(None, "torch"), (0.98, "torch"), (1.0, "torch"), (1.01, "triton")])
def test_auto_takes_what_was_measured_to_be_faster(
    speedup: float | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, {"nt gated 4096x96x64": {"tile": "narrow", "speedup": speedup}})
    for m in (2049, 4096):  # the next power of two
        choice = choose("nt gated", m, 96, 64, BF16, CPU)
        assert (choice.backend, choice.tile, choice.speedup) == (backend, "narrow", speedup)
        assert choice.options == TILES["half pointers"]["narrow"]
        assert choose("nt gated", m, 96, 64, torch.float16, CPU) == choice


@pytest.mark.parametrize("place", [("nt gated", 2048, 96, 64), ("nt gated", 4097, 96, 64), ("nt gated", 4096, 95, 64)])
def test_what_has_no_row_is_torch_s(place: tuple[str, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"nt gated 4096x96x64": {"tile": "narrow", "speedup": 2.0}})
    assert choose(*place, BF16, CPU).backend == "torch"
    for kind in ("nn gated", "nt plain"):
        assert choose(kind, 4096, 96, 64, BF16, CPU).backend == "torch"
    # in fp32 nothing was measured
    assert choose("nt gated", 4096, 96, 64, torch.float32, CPU)[:3] == ("torch", "pointers", "exact")


def test_a_row_is_of_the_way_it_was_measured_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """By descriptors; matrices that only pointers can read are others."""
    tiles = TILES | {"half descriptors": {"big": {"BLOCK_M": 128, "BLOCK_N": 256}}}
    pretend(monkeypatch, {"nt plain 16x16x16": {"tile": "big", "speedup": 2.0}}, tiles)
    monkeypatch.setattr(tables, "architecture_of", lambda device: 90)
    choice = choose("nt plain", 16, 16, 16, BF16, CPU)
    assert choice[:3] == ("triton", "descriptors", "big")
    choice = choose("nt plain", 16, 16, 16, BF16, CPU, fit=False)
    assert (choice.backend, choice.loads, choice.speedup) == ("torch", "pointers", None)
    a, b = matrix(16, 16, BF16, "n"), matrix(16, 16, BF16, "t")
    assert faster_by_kernel(a, b, "plain", False)
    assert not faster_by_kernel(a.new_zeros(16, 17)[:, :16], b, "plain", False)
    assert not faster_by_kernel(a, b, "bias", False)


@pytest.mark.parametrize(("capability", "architecture"), [((8, 6), 80), ((9, 0), 90), ((10, 3), 100), ((12, 0), 80)])
def test_the_table_of_a_device(capability: tuple[int, int], architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    tables.architecture_of.cache_clear()
    try:
        assert tables.architecture_of(torch.device("cuda", 0)) == architecture
    finally:
        tables.architecture_of.cache_clear()


def test_the_tokens_are_k_of_a_weight_s_gradient() -> None:
    assert key_of("tn accumulate", 6144, 4096, 5000) == "tn accumulate 6144x4096x8192"
    assert key_of("nt plain", 5000, 6144, 4096) == "nt plain 8192x6144x4096"
    assert [matmul_choice.next_power_of_two(x) for x in (0, 1, 2, 3, 4, 5, 1025)] == [1, 1, 2, 4, 4, 8, 2048]


@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
def test_layouts(layout: str) -> None:
    a, b = matrix(3, 5, BF16, layout[0]), matrix(5, 4, BF16, layout[1])
    assert kind_of(a, b, "gelu") == f"{layout} gelu"


def test_the_derived_tile_by_hand() -> None:
    """128 x 128: on 4 multiprocessors 4 small tiles are one wave, one large one is another; 512 x 512 is 16 to 4."""
    tiles = TILES["half pointers"]
    assert derived_tile(tiles, 128, 128, 4) == "narrow"
    assert derived_tile(tiles, 512, 512, 4) == "wide"  # 16 · (64² + 32 · 128) against 4 · (128² + 32 · 256)
    assert derived_tile(tiles, 1, 1, 4) == "narrow"


@pytest.mark.parametrize("speedup", [0.9, 1.1])
def test_torch_compile_knows_the_choice(speedup: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"nt plain 4x5x4": {"tile": "wide", "speedup": speedup}})

    def chosen(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + 1 if faster_by_kernel(a, b, "plain", False) else a + 2

    a, b = torch.zeros(3, 4, dtype=BF16), torch.zeros(5, 4, dtype=BF16).t()
    torch.compiler.reset()
    compiled = torch.compile(chosen, fullgraph=True, backend="eager")
    assert (compiled(a, b) == (1 if speedup > 1 else 2)).all()
    # another number of tokens, a symbol from now on, has no row
    assert (compiled(torch.zeros(9, 4, dtype=BF16), b) == 2).all()
    assert (compiled(torch.zeros(17, 4, dtype=BF16), b) == 2).all()


def test_shapes_of_llama_by_hand() -> None:
    """8B on 4 of its ranks: 8 query and 2 key heads of 128, 3584 of the MLP's 14336."""
    model = MODELS[0]
    assert [tuple(linear) for linear in linears(model, 4)] == [
        (1024 + 2 * 256, 4096, "plain"),
        (4096, 1024, "plain"),
        (7168, 4096, "gated"),
        (4096, 3584, "plain"),
        (32064, 4096, "plain"),
    ]
    assert [linear.epilogue for linear in linears(model, 1)] == ["plain", "residual", "gated", "residual", "plain"]
    assert [tuple(linear) for linear in linears(MODELS[2], 8)] == [
        (576, 1536, "bias"),
        (1536, 192, "plain"),
        (768, 1536, "gelu"),
        (1536, 768, "plain"),
    ]
    found = shapes([model], [8192])
    assert Shape("nt gated", 8192, 7168, 4096) in found  # forward, gradient of the input, of the weight
    assert Shape("nn plain", 8192, 4096, 7168) in found
    assert Shape("tn accumulate", 7168, 4096, 8192) in found
    assert len(set(found)) == len(found)


def test_every_model_and_tp_is_there() -> None:
    """All that divide: 20 heads not by 8."""
    assert [(m.hidden, m.heads) for m in MODELS] == [
        (4096, 32),
        (8192, 64),
        (1536, 16),
        (1920, 20),
        (2304, 24),
        (3072, 32),
    ]
    keys = {key_of(*shape) for shape in shapes()}
    for model in MODELS:
        for tp in (1, 2, 4, 8):
            there = {f"nt plain {count}x{linears_of(model, tp)}" in keys for count in TOKENS}
            assert there == {model.heads % tp == 0}


def linears_of(model: Any, tp: int) -> str:
    """The key of its first linear."""
    first = next(linears(model, tp))
    return f"{first.outputs}x{first.inputs}"


def complaints(architecture: int, read: dict[str, Any]) -> list[str]:
    """What is wrong with a table."""
    found = []
    for family, tiles in read["tiles"].items():
        for tile, options in tiles.items():
            if options.keys() != OPTIONS or tile != "x".join(str(options[f"BLOCK_{d}"]) for d in "MNK"):
                found.append(f"{family} {tile} is {options}")
    if set(read["shapes"]) != {key_of(*shape) for shape in shapes()}:
        found.append("the rows are not those of the models")
    best = "descriptors" if "half descriptors" in read["tiles"] else "pointers"
    tiles, multiprocessors = read["tiles"][f"half {best}"], matmul_choice.MULTIPROCESSORS[architecture]
    for shape in shapes():
        row = read["shapes"].get(key_of(*shape), {"tile": None, "speedup": None})
        if row["tile"] not in tiles:
            found.append(f"{key_of(*shape)}: no tile {row['tile']}")
        elif row["speedup"] is None and row["tile"] != derived_tile(tiles, shape.m, shape.n, multiprocessors):
            found.append(f"{key_of(*shape)}: {row['tile']} does not follow from its size")
        if row["speedup"] is not None and not read["measured"]:
            found.append(f"{key_of(*shape)}: measured, nobody knows where")
    return found


@pytest.mark.parametrize("architecture", tables.ARCHITECTURES)
def test_the_committed_tables(architecture: int) -> None:
    read = table(architecture)
    assert read["architecture"] == architecture
    assert complaints(architecture, read) == []
    path = tune_matmul.TABLES / f"matmul_sm_{architecture}.json"
    assert path.read_text() == tune_matmul.rendered(json.loads(path.read_text()))


def set_row(read: dict[str, Any], row: dict[str, Any]) -> None:
    read["shapes"][next(iter(read["shapes"]))] = row


@pytest.mark.parametrize(
    "spoil",
    [
        lambda read: read["shapes"].popitem(),
        lambda read: read["shapes"].update({"nt plain 1x1x1": {"tile": "128x256x64", "speedup": None}}),
        lambda read: set_row(read, {"tile": "1x1x1", "speedup": None}),
        lambda read: set_row(read, {"tile": "64x64x64", "speedup": None}),
        lambda read: set_row(read, {"tile": "128x256x64", "speedup": 1.2}),
        lambda read: read["tiles"]["half descriptors"]["128x256x64"].update(BLOCK_K=32),
        lambda read: read["tiles"]["half descriptors"]["128x256x64"].pop("SLICES"),
    ],
)
def test_a_wrong_table_is_reported(spoil: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    """Negative control: rows that are missing, too many, of unknown or unlikely tiles, or measured by no one."""
    read = json.loads((tune_matmul.TABLES / "matmul_sm_90.json").read_text())
    spoil(read)
    assert complaints(90, read) != []
