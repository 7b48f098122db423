"""Of any module: what its parallel layers send is the trace's, and the rest is counted by hand."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed import Ranks
from tests.planner.steps import Kind, counted
from tpformer import ColumnParallelLinear, Mesh, ParallelConfig, RowParallelLinear, VocabParallelEmbedding
from tpformer.layers.attention import AttentionConfig, SelfAttention
from tpformer.layers.embedding import VocabParallelHead
from tpformer.layers.norm import RMSNorm
from tpformer.parallel.data import GradientBuckets
from tpformer.planner import dp_traffic
from tpformer.planner.module_traffic import module_traffic
from tpformer.trace import trace_communication

D, B, S, MICRO_BATCHES, BUCKET_BYTES = 16, 2, 8, 3, 4000


class Own(nn.Module):
    """A user's model of tpformer's layers, each with its options; one of them used twice, one frozen."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.embedding = VocabParallelEmbedding(50, D, mesh=mesh)
        self.norm = RMSNorm(D, mesh=mesh)
        config = AttentionConfig(D, num_heads=4, num_kv_heads=1, head_dim=4, qkv_bias=True, out_bias=True, qk_norm=True)
        self.attention = SelfAttention(config, mesh=mesh)
        self.up, self.down = ColumnParallelLinear(D, 32, mesh=mesh), RowParallelLinear(32, D, mesh=mesh)
        self.whole = ColumnParallelLinear(D, 24, mesh=mesh, gather_output=True)
        self.cut = RowParallelLinear(24, D, mesh=mesh, input_is_parallel=False)
        self.head = VocabParallelHead(D, 50, mesh=mesh)
        self.up.weight.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.attention(self.norm(x))
        for _ in range(2):
            x = x + self.down(torch.relu(self.up(x)))
        return self.head(x + self.cut(self.whole(x)))


def traced(layout: ParallelConfig) -> Counter[Kind]:
    """On a rank: the collectives of a step."""
    mesh = Mesh.of(layout, "cpu")
    model = Own(mesh)
    gradients = GradientBuckets(model, mesh, bucket_bytes=BUCKET_BYTES)
    with trace_communication() as trace:
        for number in range(MICRO_BATCHES):
            gradients.start(last=number == MICRO_BATCHES - 1)
            model(torch.zeros(B, S, dtype=torch.int64)).square().mean().backward()
        gradients.finish()
    return Counter((call.op, call.axis, call.bytes, call.dtype, call.phase) for call in trace.calls)


LAYOUTS = [
    ParallelConfig(tp=2, dp=1),
    ParallelConfig(tp=2, dp=1, sequence_parallel=True),
    ParallelConfig(tp=4, dp=1, sequence_parallel=True),
    ParallelConfig(tp=2, dp=2, sequence_parallel=True),
    ParallelConfig(dp=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda p: f"tp{p.tp}dp{p.dp}{'sp' * p.sequence_parallel}")
def test_parallel_layers_send_what_was_counted(
    layout: ParallelConfig, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With copies, partial gradients and several buckets; the same on every rank."""
    monkeypatch.setattr(dp_traffic, "BUCKET_BYTES", BUCKET_BYTES)
    step = counted_step(Own(Mesh(sequence_parallel=layout.sequence_parallel)), layout)
    assert [step] * (layout.tp * (layout.dp or 1)) == ranks(traced, layout.tp * (layout.dp or 1), layout)


def counted_step(model: nn.Module, layout: ParallelConfig) -> Counter[Kind]:
    tokens = torch.zeros(B, S, dtype=torch.int64)
    return counted(module_traffic(model, tokens, layout, micro_batches=MICRO_BATCHES).step)


CHANGES: dict[str, Callable[[Own], Any]] = {
    "the output is not gathered": lambda own: setattr(own.whole, "gather_output", False),
    "the input is cut already": lambda own: setattr(own.cut, "input_is_parallel", True),
    "nothing is frozen": lambda own: own.up.weight.requires_grad_(True),
    "the embedding is": lambda own: own.embedding.weight.requires_grad_(False),
    "a norm more": lambda own: own.up.register_module("norm", RMSNorm(D, mesh=Mesh(sequence_parallel=True))),
    "no query norm": lambda own: setattr(own.attention.q_norm, "placements", {"weight": own.down.placements["weight"]}),
}


def test_a_model_that_differs_is_told_apart(ranks: Ranks) -> None:
    """The controls: each changes what a step sends."""
    layout = LAYOUTS[1]
    found = ranks(traced, 2, layout)[0]
    for name, change in CHANGES.items():
        model = Own(Mesh(sequence_parallel=True))
        assert counted_step(model, layout) == found
        change(model)
        assert counted_step(model, layout) != found, name


class Plain(nn.Module):
    """Shared weights, a buffer, a frozen layer, a parameter of its own, tensors made in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(3)])
        self.normal = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 10)
        self.head.weight = self.table.weight
        self.scale = nn.Parameter(torch.ones(4))
        self.normal.requires_grad_(False)

    def forward(self, tokens: Tensor, twice: bool = False) -> dict[str, Any]:
        x = self.table(tokens) + torch.arange(4) * self.scale
        for block in [*self.blocks, *self.blocks] if twice else self.blocks:
            x = block(x)
        return {"logits": self.head(self.normal(x.transpose(1, 2)).transpose(1, 2))}


def test_any_module_by_hand() -> None:
    module = Plain()
    before = {name: x.clone() for name, x in module.state_dict().items()}
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    found = module_traffic(module, tokens, ParallelConfig(dp=4), micro_batches=3, depth=2)
    layers = [(x.name, x.alike, x.parameters, x.gradient_bytes, x.output_bytes) for x in found.layers]
    assert layers == [
        ("(its own)", 1, 4, 16, 0),
        ("table", 1, 40, 160, 2 * 5 * 4 * 4),
        ("blocks.0 to blocks.2", 3, 58, 232, 160),
        ("normal", 1, 8, 0, 160),
        ("head", 1, 10, 40, 2 * 5 * 10 * 4),  # its weight is the table's
    ]
    (gradients,) = found.step
    assert (gradients.op, gradients.axis, gradients.bytes, gradients.calls) == ("all_reduce", "dp", 4 * 228, 1)
    assert (found.calls(), found.carried(), found.sent()) == (1, 912, 912 * 2 * 3 // 4)
    assert all(torch.equal(before[name], x) for name, x in module.state_dict().items())
    assert not any(part._forward_hooks for part in module.modules())
    by_name = module_traffic(module, {"tokens": tokens, "twice": True}, depth=1)
    assert [(x.name, x.alike, x.parameters) for x in by_name.layers][2] == ("blocks", 1, 174)
    assert by_name.step == ()


def test_gradients_in_the_parameters_dtype() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).to(torch.bfloat16))
    module.forward = lambda x: module[1](module[0](x).bfloat16())  # type: ignore[method-assign]
    own = module_traffic(module, torch.zeros(1, 4), ParallelConfig(dp=2), gradient_dtype=None)
    wide = module_traffic(module, torch.zeros(1, 4), ParallelConfig(dp=2))
    assert [(each.dtype, each.bytes) for each in own.step] == [("bfloat16", 40), ("float32", 80)]
    assert [(each.dtype, each.bytes, each.calls) for each in wide.step] == [("float32", 80, 1), ("float32", 80, 1)]


class Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sum().item()


def test_what_cannot_be_counted_says_so() -> None:
    x, linear = torch.zeros(2, 4), nn.Linear(4, 4)
    with pytest.raises(ValueError, match="Reads cannot run on the meta device"):
        module_traffic(Reads(), x)
    with pytest.raises(ValueError, match=r"depth \(0\) must be at least 1"):
        module_traffic(linear, x, depth=0)
    with pytest.raises(ValueError, match=r"pp \(2\) must be 1 and dp_mode \(replicate\)"):
        module_traffic(linear, x, ParallelConfig(pp=2))
    with pytest.raises(ValueError, match=r"dp_mode \(fsdp\) replicate"):
        module_traffic(linear, x, ParallelConfig(dp=2, dp_mode="fsdp"))
    split = ParallelConfig(tp=2, sequence_parallel=True)
    with pytest.raises(ValueError, match="made on Mesh\\(sequence_parallel=False\\)"):
        module_traffic(ColumnParallelLinear(4, 4), torch.zeros(1, 2, 4), split)
    known = ColumnParallelLinear(4, 4, mesh=Mesh(sequence_parallel=True))
    with pytest.raises(ValueError, match=r"sequence length \(3\) must be divisible by tp \(2\)"):
        module_traffic(nn.Sequential(known), torch.zeros(1, 3, 4), split)
    with pytest.raises(ValueError, match=r"dim 0 of 0.weight \(6\) must be divisible by tp \(4\)"):
        module_traffic(nn.Sequential(ColumnParallelLinear(4, 6)), torch.zeros(1, 3, 4), ParallelConfig(tp=4))
