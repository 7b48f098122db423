"""A step by layers is the step: nothing is lost or counted twice; and its tables fit a terminal."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.planner.test_traffic import ALL
from tpformer import GPT, Axis, Llama, LlamaConfig, Mesh, ParallelConfig
from tpformer.models.gpt import GPTConfig
from tpformer.planner import step_traffic as by_layers
from tpformer.planner.candidate import Candidate
from tpformer.planner.module_traffic import module_traffic
from tpformer.planner.step_traffic import StepTraffic, step_traffic
from tpformer.planner.traffic import traffic
from tpformer.planner.traffic_table import WIDTH, formulas, size, traffic_table

ONCE = ("partial gradients of copies", "gradient norm, with the loss")
LARGE = LlamaConfig(128256, 8192, 80, 64, 8, ffn_hidden_size=28672, max_seq_len=8192)


def lost(found: StepTraffic) -> Counter[tuple[str, ...]]:
    """Bytes by op, phase and meaning of tensor parallelism in the step, less those of the layers."""
    left: Counter[tuple[str, ...]] = Counter()
    for each in found.step:
        if each.axis == "tp" and each.what not in ONCE:
            left[each.op, each.phase, each.what] += each.total
    for layer in found.layers:
        for each in layer.sends:
            left[each.op, each.phase, each.what] -= layer.alike * each.total
    return Counter({kind: number for kind, number in left.items() if number})


@pytest.mark.parametrize("name", ALL)
def test_the_layers_make_the_step(name: str) -> None:
    """Its collectives, and the parameters of the model that is built for the rank."""
    case = ALL[name].candidate
    for pp_rank in range(case.parallel.pp):
        found = step_traffic(case, pp_rank)
        assert found.step == traffic(case, pp_rank)
        assert not lost(found)
        model = case.model
        kind = GPT if isinstance(model, GPTConfig) else Llama
        mesh = Mesh(tp=Axis("tp", case.parallel.tp))
        built: nn.Module = kind(model, mesh, seed=None, part=case.part(pp_rank))  # type: ignore[arg-type]
        parameters = sum(p.numel() for p in built.parameters())
        assert sum(layer.alike * layer.parameters for layer in found.layers) == parameters
        assert sum(layer.alike * layer.gradient_bytes for layer in found.layers) == 4 * parameters


def test_a_layer_too_few_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    case = ALL["recomputed"].candidate
    right = by_layers.share_of
    monkeypatch.setattr(by_layers, "share_of", lambda *place: replace(right(*place), blocks=2))
    assert lost(step_traffic(case))


def test_outputs_are_what_a_stage_hands_over() -> None:
    model = replace(LARGE, num_layers=8)
    layout = ParallelConfig(tp=8, pp=4, dp=1, sequence_parallel=True, precision="bf16")
    found = step_traffic(Candidate(model, layout, 8192, 8, 2))
    (sent,) = [each for each in found.step if each.op == "send"]
    assert {layer.output_bytes for layer in found.layers} == {sent.bytes} == {2 * 1024 * 8192 * 2}


def test_the_tables_fit_and_add_up() -> None:
    layouts = [
        ParallelConfig(tp=8, pp=4, dp=16, sequence_parallel=True, recompute="full", recompute_every=3),
        ParallelConfig(tp=8, dp=64, dp_mode="hsdp", dp_shard=8, precision="bf16"),
        ParallelConfig(dp=1),
    ]
    for layout in layouts:
        found = step_traffic(Candidate(LARGE, layout, 8192, 512, 1))
        text = traffic_table(found, batches=1000, epochs=3)
        assert max(map(len, text.splitlines())) <= WIDTH
        assert f"{found.calls():,}" in text
        assert f"{3000 * found.calls():,}" in text
        assert size(3000 * found.carried()) in text
        assert size(3000 * found.sent()) in text
        assert sum(found.calls(axis) for axis in found.sizes) == found.calls()
        assert sum(found.sent(axis) for axis in found.sizes) == found.sent()
    with pytest.raises(ValueError, match=r"epochs \(0\) must be at least 1"):
        traffic_table(found, epochs=0)


def test_long_names_are_cut() -> None:
    module = nn.Sequential()
    module.add_module("a_name_of_many_letters" * 8, nn.Linear(4, 4))
    text = traffic_table(module_traffic(module, torch.zeros(1, 4)))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "…" in text


def test_formulas_have_their_numbers() -> None:
    found = step_traffic(Candidate(replace(LARGE, num_layers=4), ParallelConfig(tp=2, dp=1), 4096, 4, 2)).step
    lines = formulas(found).splitlines()
    at = lines.index("all_reduce tp forward: sum of a block's two regions")
    assert lines[at + 1].strip() == "bytes of a call  b 2 x s 4,096 x d 8,192 x bytes 4 = 268,435,456"
    assert lines[at + 2].strip() == "calls in a step  micro-batches 2 x blocks 4 x regions 2 = 16"
    assert len(lines) == 3 * len(found)


def test_sizes_are_readable() -> None:
    sizes = {0: "0 B", 24: "24 B", 10239: "10239 B", 10240: "10.00 KiB", 2**20 - 1: "1024.0 KiB", 2**20: "1.00 MiB"}
    sizes |= {3 * 2**30: "3.00 GiB", 999 * 2**40: "999.0 TiB", 2**70: "1024.0 EiB"}
    assert {number: size(number) for number in sizes} == sizes
