"""Recomputation changes nothing but memory: numbers, names and hooks stay, and no collective runs again needlessly."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tpformer
from tests.distributed import Ranks
from tests.proofs.cases import Config, Layout, Measured, build, build_random, gpt, llama, measure_model, random_batch
from tpformer import GPT, Key, Llama, Mesh
from tpformer.layers.linear import RowParallelLinear
from tpformer.parallel.data import GradientBuckets
from tpformer.parallel.recompute import apply_recompute
from tpformer.parallel_config import ParallelConfig
from tpformer.train.memory import measure_memory

L = 3
DROPOUT: dict[str, Any] = {"num_layers": L, "dropout": 0.1, "attention_dropout": 0.1}
MODELS: dict[str, Config] = {"gpt": gpt(**DROPOUT), "llama": llama(**DROPOUT, num_kv_heads=2, qk_norm=True)}
PLAIN: dict[str, Config] = {"gpt": gpt(num_layers=L), "llama": llama(num_layers=L)}
LAYOUTS = [Layout(1), Layout(2), Layout(2, 1, True)]
KEY = Key(5)


def selective(*modules: str) -> ParallelConfig:
    return ParallelConfig(recompute="selective", recompute_modules=modules)


FULL = ParallelConfig(recompute="full")
WAYS = {
    "full": FULL,
    "every second": ParallelConfig(recompute="full", recompute_every=2),
    "attention.core": selective("attention.core"),
    "attention, mlp": selective("attention", "mlp"),
    "norms, projections": selective("attention_norm", "mlp_norm", "attention.qkv", "attention.out"),
    "core within attention": selective("attention", "attention.core"),
}


def differences(expected: Measured, found: Measured) -> list[str]:
    """What is not bit for bit the same."""
    assert expected.keys() == found.keys()
    return [name for name in expected if not np.array_equal(expected[name], found[name])]


# 1. the numbers


def run_ways(name: str, layout: Layout) -> dict[str, list[str]]:
    """On a rank: what each way of recomputation changes, without and with dropout."""
    mesh, changed = layout.mesh(), {}
    for keyed, key in (("without a key", None), ("dropout", KEY)):
        expected = measure_model(build_random(MODELS[name], mesh, torch.float32), key)
        for way, config in WAYS.items():
            model = build_random(MODELS[name], mesh, torch.float32)
            apply_recompute(model, config)
            changed[f"{way}, {keyed}"] = differences(expected, measure_model(model, key))
    return changed


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient_are_the_same_bit_for_bit(name: str, layout: Layout, ranks: Ranks) -> None:
    for changed in ranks(run_ways, layout.world_size, name, layout):
        assert changed == {f"{way}, {key}": [] for way in WAYS for key in ("without a key", "dropout")}


class Careless(nn.Module):
    """An MLP whose dropout draws from torch's generator."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.mlp(x), 0.5)


def test_a_mask_from_a_generator_is_noticed() -> None:
    """Negative control: recomputation draws another one."""
    found = []
    for config in (ParallelConfig(), FULL):
        model = build_random(PLAIN["gpt"], Mesh(), torch.float32)
        for name in model.blocks:
            model.blocks[name].mlp = Careless(model.get_submodule(f"blocks.{name}.mlp"))
        apply_recompute(model, config)
        torch.manual_seed(0)
        found.append(measure_model(model))
    changed = differences(*found)
    assert "loss" not in changed
    assert "blocks.0.attention.qkv.weight" in changed


def sums_of(model: GPT | Llama) -> Measured:
    """A step of two micro-batches into gradient buckets."""
    mesh = model.mesh
    buckets = GradientBuckets(model, mesh, bucket_bytes=1)
    for number in range(2):
        buckets.start(last=number == 1)
        model.loss(*random_batch(101, seed=number), key=KEY.fold(number)).backward()
    return {name: total.numpy().copy() for name, total in buckets.finish().items()}


def run_sums(name: str, layout: Layout) -> dict[str, list[str]]:
    """On a rank: what each way changes in the gradients that linear layers sum themselves."""
    mesh, changed = layout.mesh(), {}
    expected = sums_of(build_random(MODELS[name], mesh, torch.float32))
    for way, config in WAYS.items():
        model = build_random(MODELS[name], mesh, torch.float32)
        apply_recompute(model, config)
        changed[way] = differences(expected, sums_of(model))
    return changed


@pytest.mark.parametrize("layout", [Layout(1), Layout(2, 1, True), Layout(1, 2)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_sums_over_micro_batches_are_the_same(name: str, layout: Layout, ranks: Ranks) -> None:
    for changed in ranks(run_sums, layout.world_size, name, layout):
        assert changed == {way: [] for way in WAYS}


# 2. the collectives

Calls = Counter[tuple[str, str, str]]


def calls_of(name: str, layout: Layout, config: ParallelConfig, after_down: bool = False) -> Calls:
    """Op, phase and file of every collective of a step."""
    model = build(PLAIN[name], layout.mesh())
    if after_down:  # saves a tensor after the block's last sum
        for module in model.modules():
            if isinstance(module, RowParallelLinear):
                module.register_forward_hook(lambda _, inputs, y: y * torch.ones(()))
    apply_recompute(model, config)
    with tpformer.trace_communication() as trace:
        model.loss(*random_batch(101)).backward()
    return Counter((call.op, call.phase, call.site.split(":")[0].split("/")[1]) for call in trace.calls)


def run_calls(name: str, layout: Layout, after_down: bool = False) -> dict[str, Calls]:
    """On a rank: what each way communicates beyond what is communicated without it."""
    none = calls_of(name, layout, ParallelConfig(), after_down)
    found = {way: calls_of(name, layout, config, after_down) for way, config in WAYS.items()}
    assert all(calls >= none for calls in found.values())
    return {way: calls - none for way, calls in found.items()}


def again(**times: int) -> Calls:
    """So many collectives of a linear layer, in backward."""
    return Counter({(op, "backward", "linear.py"): count for op, count in times.items() if count})


@pytest.mark.parametrize("name", PLAIN)
def test_without_sequence_parallelism_the_attention_s_sum_runs_again_and_no_other(name: str, ranks: Ranks) -> None:
    """Of a whole block; what is behind it, the MLP's sum, backward needs no more."""
    expected = {way: again() for way in WAYS} | {
        "full": again(all_reduce=L),
        "every second": again(all_reduce=2),  # blocks 0 and 2
    }
    for found in ranks(run_calls, 2, name, Layout(2)):
        assert found == expected


@pytest.mark.parametrize("name", PLAIN)
def test_with_it_both_gathers_and_the_attention_s_scatter_run_again(name: str, ranks: Ranks) -> None:
    expected = {
        "full": again(all_gather=2 * L, reduce_scatter=L),
        "every second": again(all_gather=2 * 2, reduce_scatter=2),
        "attention.core": again(),
        "attention, mlp": again(all_gather=2 * L),
        "norms, projections": again(all_gather=L),  # for nothing: qkv alone, which keeps its input either way
        "core within attention": again(all_gather=L),
    }
    for found in ranks(run_calls, 2, name, Layout(2, 1, True)):
        assert found == expected


def test_a_sum_that_is_replayed_is_counted(ranks: Ranks) -> None:
    """Negative control: something saved after the sum asks for it."""
    for found in ranks(run_calls, 2, "gpt", Layout(2), True):
        assert found["full"] == again(all_reduce=2 * L)
        assert found["attention, mlp"] == again(all_reduce=2 * L)
    for found in ranks(run_calls, 2, "gpt", Layout(2, 1, True), True):
        assert found["full"] == again(all_gather=2 * L, reduce_scatter=2 * L)


# 3. the memory

B, S, D = 2, 64, 64


def peak_of(layers: int, config: ParallelConfig) -> int:
    """The activations of a step, in bytes."""
    model = build(llama(num_layers=layers, hidden_size=D, ffn_hidden_size=160, max_seq_len=S))
    apply_recompute(model, config)
    tokens, targets = torch.randint(101, (2, B, S), generator=torch.Generator().manual_seed(0))
    buckets = GradientBuckets(model, Mesh())
    with measure_memory(torch.device("cpu")) as memory:
        model.loss(tokens, targets).backward()
    buckets.close()
    return memory.bytes


def test_a_block_keeps_its_input_only() -> None:
    def of_a_block(config: ParallelConfig) -> float:
        return (peak_of(6, config) - peak_of(4, config)) / 2

    whole = B * S * D * 4
    assert of_a_block(FULL) == whole
    none = of_a_block(ParallelConfig())
    assert none > 10 * whole  # negative control
    assert of_a_block(ParallelConfig(recompute="full", recompute_every=2)) == (whole + none) / 2
    assert whole < of_a_block(selective("attention", "mlp")) < of_a_block(selective("mlp")) < none


# 4. what it leaves alone


@pytest.mark.parametrize("way", WAYS)
def test_names_stay_and_hooks_run_once(way: str) -> None:
    model = build(PLAIN["llama"])
    names = [name for name, _ in model.named_parameters()], list(model.state_dict())
    apply_recompute(model, WAYS[way])
    assert ([name for name, _ in model.named_parameters()], list(model.state_dict())) == names
    seen: list[str] = []
    model.blocks["0"].register_forward_pre_hook(lambda *_: seen.append("before"))
    model.blocks["0"].register_forward_hook(lambda *_: seen.append("after"))
    model.loss(*random_batch(101)).backward()
    assert seen == ["before", "after"]


def count_forwards(module: nn.Module) -> list[None]:
    """Grows by one at each run of a module's forward, however it is called."""
    runs: list[None] = []
    forward: Callable[..., Any] = module.forward

    def counted(*args: Any, **options: Any) -> Any:
        runs.append(None)
        return forward(*args, **options)

    module.forward = counted
    return runs


def test_only_backward_recomputes_and_only_every_kth_block_by_its_global_number() -> None:
    model = build(llama(num_layers=5))
    del model.blocks["0"]  # as on the second stage of a pipeline
    runs = {name: count_forwards(model.get_submodule(f"blocks.{name}.mlp.gate_up")) for name in model.blocks}
    apply_recompute(model, ParallelConfig(recompute="full", recompute_every=3))
    tokens, targets = random_batch(101)
    with torch.no_grad():
        model.loss(tokens, targets)
    assert {name: len(found) for name, found in runs.items()} == {"1": 1, "2": 1, "3": 1, "4": 1}
    model.loss(tokens, targets).backward()
    assert {name: len(found) for name, found in runs.items()} == {"1": 2, "2": 2, "3": 3, "4": 2}


def test_a_deep_copy_recomputes_with_its_own_weights() -> None:
    model = build_random(PLAIN["gpt"], Mesh(), torch.float32)
    apply_recompute(model, FULL)
    copied = copy.deepcopy(model)
    expected = measure_model(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert differences(expected, measure_model(copied)) == []


def test_a_module_that_a_block_does_not_have_is_named() -> None:
    model = build(PLAIN["gpt"])
    with pytest.raises(ValueError, match=r"recompute_modules \(core, attn\) must be among a block's: attention_norm,"):
        apply_recompute(model, ParallelConfig(recompute="selective", recompute_modules=("core", "mlp", "attn")))
    with pytest.raises(ValueError, match=r"attention.core, .*mlp.up"):  # also where no block of its number is here
        apply_recompute(model, ParallelConfig(recompute="selective", recompute_modules=("x",), recompute_every=9))
