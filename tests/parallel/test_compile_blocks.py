"""Compiled blocks: one graph for all of them, no break, and the losses, gradients and collectives of eager ones."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from tests.distributed import Ranks
from tests.layers.prove import gradient
from tests.proofs.cases import TOLERANCE, Config, Layout, Measured, build_random, gpt, llama, mismatches, random_batch
from tpformer import GPT, Key, Llama, Mesh, trace_communication
from tpformer.layers import linear
from tpformer.mesh import Overlap
from tpformer.overlap import gather_matmul, matmul_scatter
from tpformer.parallel.compile import compile_blocks
from tpformer.parallel.data import GradientBuckets

# dynamo's own tracing does what autograd deprecates, and asks activations for their gradient
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

Model = GPT | Llama
Calls = Counter[tuple[str, str, str, str, str]]
FP64, FP32 = torch.float64, torch.float32
DROPOUT: dict[str, Any] = {"dropout": 0.2, "attention_dropout": 0.3}
CONFIGS: dict[str, Config] = {"gpt": gpt(num_layers=3), "llama": llama(num_layers=3, num_kv_heads=2)}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(model: Model, number: int, samples: int = 4) -> tuple[Measured, Calls]:
    """Loss and gradients of a step with its own batch and masks, and the collectives, by what they are."""
    model.zero_grad()
    tokens, targets = (x[:samples] for x in random_batch(model.config.vocab_size, seed=number))
    with trace_communication() as trace:
        loss = model.loss(tokens, targets, key=Key(2**63, sample=samples * number).fold("step", number))
        loss.backward()
    found = {name: gradient(p).clone().numpy() for name, p in model.named_parameters()}
    calls = Counter((call.op, call.axis, call.phase, call.dtype, str(call.bytes)) for call in trace.calls)
    return found | {"loss": loss.detach().numpy()}, calls


def graphs() -> tuple[int, int]:
    """How many graphs were compiled since the compiler was reset, and how many breaks there were between graphs."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def compile_here(model: Model, backend: str = "aot_eager") -> None:
    """Compile the blocks, and count from here."""
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(model, backend=backend)


def wrong_steps(model: Model, eager: list[tuple[Measured, Calls]], dtype: torch.dtype = FP64) -> list[str]:
    """What steps of a compiled model have else than eager ones."""
    wrong = []
    for number, (measured, calls) in enumerate(eager):
        found, found_calls = step(model, number)
        wrong += [f"step {number}: {text}" for text in mismatches(measured, found, TOLERANCE[dtype])]
        wrong += [f"step {number}: {found_calls} instead of {calls}"] * (found_calls != calls)
    return wrong


def chunked() -> tuple[list[str], tuple[int, int]]:
    """On a rank: the same of matmuls that run beside their communication, chunk by chunk."""
    small: dict[str, Any] = {f.__name__: partial(f, least_rows=2) for f in (gather_matmul, matmul_scatter)}
    with patch.multiple(linear, **small):
        return compared(gpt(num_layers=1), Layout(2, 1, True), "chunked")


def compared(config: Config, layout: Layout, overlap: Overlap = "auto") -> tuple[list[str], tuple[int, int]]:
    """On a rank: what is wrong in three compiled steps, and the number of graphs and of breaks."""
    model = build_random(config, replace(layout.mesh(), overlap=overlap), FP64)
    names = [name for name, _ in model.named_parameters()]
    eager = [step(model, number) for number in range(3)]
    compile_here(model)
    wrong = wrong_steps(model, eager)
    assert names == [name for name, _ in model.named_parameters()]
    torch._dynamo.reset()
    return wrong, graphs()


# 1. one graph, no break, the eager numbers


@pytest.mark.parametrize("name", CONFIGS)
def test_one_process(name: str) -> None:
    """Three layers and three steps with masks of their own are one graph."""
    assert compared(replace(CONFIGS[name], **DROPOUT), Layout()) == ([], (1, 0))


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp2", "tp2sp"])
@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks(name: str, sequence_parallel: bool, ranks: Ranks) -> None:
    """So they are with tensor parallelism, whose collectives are those of eager blocks: as many, as large, as late."""
    dropout = DROPOUT if name == "gpt" and sequence_parallel else {}  # where a rank has a part of each mask
    assert ranks(compared, 2, replace(CONFIGS[name], **dropout), Layout(2, 1, sequence_parallel)) == [([], (1, 0))] * 2


def test_chunked_overlap(ranks: Ranks) -> None:
    assert ranks(chunked, 2) == [([], (1, 0))] * 2


def test_triton_kernels_draw_the_same_masks() -> None:
    model = build_random(gpt(num_layers=1, **DROPOUT, backend="triton"), Mesh(), FP32)
    eager = [step(model, number) for number in range(2)]
    compile_here(model)
    assert wrong_steps(model, eager, FP32) == []
    assert graphs() == (1, 0)


def test_inductor() -> None:
    model = build_random(gpt(num_layers=1), Mesh(), FP32)
    eager = [step(model, number) for number in range(2)]
    compile_here(model, "inductor")
    assert wrong_steps(model, eager, FP32) == []
    assert graphs() == (1, 0)


def test_a_copy_of_a_compiled_model_is_compiled_with_its_own_weights() -> None:
    model = build_random(gpt(num_layers=1), Mesh(), FP64)
    compile_here(model, "eager")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    expected = step(build_random(gpt(num_layers=1), Mesh(), FP64), 0)
    assert wrong_steps(twin, [expected]) == []
    assert graphs() == (1, 0)


def test_without_gradients_a_block_is_not_compiled() -> None:
    """Sampling, one token longer each time, would be a graph each."""
    model = build_random(CONFIGS["gpt"], Mesh(), FP64)
    tokens = random_batch(101)[0]
    expected = model.generate(tokens, max_new_tokens=3, temperature=0.0)
    compile_here(model, "eager")
    assert torch.equal(model.generate(tokens, max_new_tokens=3, temperature=0.0), expected)
    assert graphs() == (0, 0)


# 2. with what is around blocks


def recompute(model: Model) -> None:
    """Put torch's checkpoint around the forward of each block, compiled or not."""

    def around(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)

    for block in model.blocks.values():
        block.forward = around(block.forward)


def recomputed(config: Config, layout: Layout) -> tuple[list[str], tuple[int, int]]:
    """On a rank: what recomputation of compiled blocks has else than that of eager ones."""
    model, eager = (build_random(config, layout.mesh(), FP64) for _ in range(2))
    recompute(eager)
    expected = [step(eager, number) for number in range(2)]
    for _, calls in expected:  # a program is run again whole, a block's last sum included
        (sums,) = (call for call in calls if call[0] == "reduce_scatter" and call[2] == "backward")
        calls[sums] += config.num_layers
    compile_here(model)
    recompute(model)
    wrong = wrong_steps(model, expected)
    torch._dynamo.reset()
    return wrong, graphs()


def test_recomputation_around_a_compiled_block(ranks: Ranks) -> None:
    """The same masks again, and the same collectives but for one sum a block."""
    found = ranks(recomputed, 2, replace(CONFIGS["gpt"], **DROPOUT), Layout(2, 1, True))
    assert found == [([], (1, 0))] * 2


def sharded(config: Config, compiled: bool) -> tuple[Measured, Calls, tuple[int, int]]:
    """On a rank of dp 2: loss, whole gradients and collectives of a step with FSDP2 around each block."""
    mesh = Layout(1, 2).mesh()
    assert mesh.device_mesh is not None
    model = build_random(config, mesh, FP64)
    compile_here(model) if compiled else counters.clear()
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh.device_mesh["dp"])
    fully_shard(model, mesh=mesh.device_mesh["dp"])
    register_fsdp_forward_method(model, "loss")
    tokens, targets = (x.chunk(2)[mesh.dp.rank] for x in random_batch(101))
    for _ in range(2):
        model.zero_grad()
        with trace_communication() as trace:
            loss = model.loss(tokens, targets)
            loss.backward()
    found = {name: gradient(p).full_tensor().numpy() for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    calls = Counter((call.op, call.axis, call.phase, call.dtype, str(call.bytes)) for call in trace.calls)
    torch._dynamo.reset()
    return found | {"loss": loss.detach().numpy()}, calls, graphs()


def test_fully_shard_around_a_compiled_block(ranks: Ranks) -> None:
    eager, compiled = (ranks(sharded, 2, CONFIGS["llama"], how) for how in (False, True))
    model = build_random(CONFIGS["llama"], Mesh(), FP64)
    model.loss(*random_batch(101)).backward()
    whole = {name: gradient(p).numpy() for name, p in model.named_parameters()}
    for (expected, calls, _), (found, found_calls, compiled_graphs) in zip(eager, compiled, strict=True):
        assert mismatches(expected, found, TOLERANCE[FP64]) == []
        assert mismatches(whole, {k: v for k, v in found.items() if k != "loss"}, TOLERANCE[FP64]) == []
        assert found_calls == calls
        assert compiled_graphs == (1, 0)


def test_gradient_buckets_take_what_autograd_computes() -> None:
    """Over two micro-batches, of the weights that eager layers would have added themselves too."""
    model = build_random(CONFIGS["llama"], Mesh(), FP64)
    tokens, targets = random_batch(101)
    model.loss(tokens, targets).backward()
    expected = {name: gradient(p).numpy() for name, p in model.named_parameters()}
    model.zero_grad()
    buckets = GradientBuckets(model, Mesh())
    compile_here(model)
    for number, (x, y) in enumerate(zip(tokens.chunk(2), targets.chunk(2), strict=True)):
        buckets.start(last=number == 1)
        (model.loss(x, y) / 2).backward()  # as many targets in each half
    found = {name: total.numpy() for name, total in buckets.finish().items()}
    assert mismatches(expected, found, TOLERANCE[FP64]) == []
    assert graphs() == (1, 0)


# 3. negative controls


class Breaks(nn.Module):
    """Negative control: a break of the graph, and then the layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        torch._dynamo.graph_break()
        return self.layer(x)


def breaking() -> Model:
    """A model whose only block does."""
    model = build_random(gpt(num_layers=1), Mesh(), FP64)
    block: Any = model.blocks["0"]
    block.mlp = Breaks(block.mlp)
    return model


def test_a_break_is_refused_and_counted() -> None:
    model = breaking()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        compile_here(model, "eager")
        step(model, 0)
    model = breaking()
    really = torch.compile
    with patch.object(torch, "compile", lambda f, fullgraph, **options: really(f, **options)):
        compile_here(model, "eager")
    step(model, 0)
    compiled, breaks = graphs()
    assert compiled > 1
    assert breaks > 0


def test_another_program_is_counted() -> None:
    """Another number of samples is one, as another seed or layer would be if it were not data."""
    model = build_random(CONFIGS["gpt"], Mesh(), FP64)
    compile_here(model, "eager")
    step(model, 0)
    step(model, 0, samples=2)
    assert graphs() == (2, 0)


def test_other_masks_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: one bit of a seed wrong on its way into the compiled block."""
    import tpformer.random

    model = build_random(replace(CONFIGS["gpt"], **DROPOUT), Mesh(), FP64)
    eager = [step(model, 0)]
    right = tpformer.random._as_tensor
    monkeypatch.setattr(tpformer.random, "_as_tensor", lambda n: right(n ^ 1 << 40))
    compile_here(model, "eager")
    assert wrong_steps(model, eager) != []
