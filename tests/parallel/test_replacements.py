"""What people do with a model beside training it: it goes on working when parts of it were split."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tpformer
from tests.distributed import Ranks
from tests.parallel.owned import CASES, Block, Own, make
from tests.proofs.cases import Layout, random_batch
from tpformer import Mesh
from tpformer.mesh import Axis
from tpformer.parallel.plan import Style

PAIR: dict[str, Style] = {"up": "column", "down": "row"}
QKVO: dict[str, Style] = {"[qkv]": "column", "o": "row"}


class Attention(nn.Module):
    """Four heads of 4, counted by an attribute as einops does; q's input may be changed in place before k reads it."""

    def __init__(self, heads: int, in_place: bool = False):
        super().__init__()
        self.heads, self.in_place = heads, in_place
        layers: list[Any] = [nn.Linear(16, 16, dtype=torch.float64) for _ in "qkvo"]
        self.q, self.k, self.v, self.o = layers
        self.q.weight.requires_grad_(not in_place)  # or its gradient would need what was changed

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        q = self.q(x)
        if self.in_place:
            x.mul_(2)
        split = [y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, self.k(x), self.v(x))]
        return self.o(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(-2))


def attention(heads: int = 4, in_place: bool = False) -> Attention:
    torch.manual_seed(0)
    return Attention(heads, in_place)


def sample() -> Tensor:
    return torch.randn(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)


def checked(heads: int, tp: int) -> str:
    """On a rank: what the check says of a model that is given `heads` when it is split, and is then put back."""
    model, mesh = attention(), Layout(tp).mesh()
    before = [dict(model.named_modules()), [dict(m._forward_hooks) for m in model.modules()]]

    def check(module: Attention) -> Tensor:
        module.heads = 4 if isinstance(module.q, nn.Linear) else heads
        return module(sample())

    try:
        tpformer.parallelize(model, QKVO, mesh, check=check)
    except ValueError as error:
        assert before == [dict(model.named_modules()), [dict(m._forward_hooks) for m in model.modules()]]
        return str(error)
    return "the same"


def test_the_check_finds_what_no_look_at_the_layers_can(ranks: Ranks) -> None:
    """Heads that are counted by an attribute: without its being divided each is cut, and nothing else complains."""
    for found in ranks(checked, 2, 4, 2):
        assert "the check differs by" in found
    for found in ranks(checked, 2, 16, 2):
        assert "the check fails on the split module" in found
    assert ranks(checked, 2, 2, 2) == ["the same"] * 2


def in_place_gradient(split: bool) -> Tensor:
    """Of the input, on a rank or alone."""
    model, x = attention(4, in_place=True), sample()
    if split:
        tpformer.parallelize(model, QKVO, Layout(2).mesh())
        model.heads = 2
    model(x).square().sum().backward()
    assert x.grad is not None
    return x.grad


def test_an_input_that_is_changed_in_place_is_another(ranks: Ranks) -> None:
    expected = in_place_gradient(False)
    for found in ranks(in_place_gradient, 2, True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def recomputed(layers: bool) -> list[Tensor]:
    """On a rank: gradients with the whole module recomputed, and whether an activation is kept."""
    model, x = attention(), sample()
    if layers:
        tpformer.parallelize(model, QKVO, Layout(2).mesh())
        model.heads = 2
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    if layers:
        assert model.q.enter._last is None
        copied = copy.deepcopy(model)
        assert copied.q.enter is copied.k.enter is not model.q.enter
        copied(x)
        assert copied.q.enter._last is None
    assert x.grad is not None
    return [x.grad]


def test_recomputation_and_copies(ranks: Ranks) -> None:
    (expected,) = recomputed(False)
    for (found,) in ranks(recomputed, 2, True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def autocast(layers: bool) -> list[Any]:
    """On a rank: output and gradient in bf16."""
    torch.manual_seed(0)
    model, x = Block(16), sample().detach().float().requires_grad_()
    if layers:
        tpformer.parallelize(model, PAIR, Layout(2).mesh())
    with torch.autocast("cpu", torch.bfloat16):
        y = model.down(F.gelu(model.up(x)))
        assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    return [y.detach(), x.grad, tpformer.full_gradient(model, "up.weight")]


def test_autocast(ranks: Ranks) -> None:
    """Of the same dtype, and to bf16's rounding the same."""
    for results in ranks(autocast, 2, True):
        for found, expected in zip(results, autocast(False), strict=True):
            assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


def from_meta() -> list[Tensor]:
    """On a rank: a model that was split before it had weights."""
    weights = make(CASES["own"]).state_dict()
    with torch.device("meta"):
        model = Own()
    tpformer.parallelize(model, CASES["own"].plan, Layout(2).mesh())
    assert all(p.is_meta for p in model.parameters())
    model.double().to_empty(device="cpu")
    tpformer.load_full_state(model, {name: weights[name] for name, _ in model.named_parameters()})
    return [model(random_batch(101)[0]).logits.detach()]


def test_weights_can_come_later(ranks: Ranks) -> None:
    expected = make(CASES["own"])(random_batch(101)[0]).logits
    for (found,) in ranks(from_meta, 2):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_each_layer_stays_what_it_was_but_for_its_part() -> None:
    """Names, dtypes, what is frozen, training mode, what is there twice; no process group, rank 1 of 2, on meta."""
    with torch.device("meta"):
        model = Own(dim=16).half().eval()
    names = [name for name, _ in model.named_parameters()]
    tpformer.parallelize(model, CASES["own"].plan, Mesh(tp=Axis("tp", 2, 1)))
    assert [name for name, _ in model.named_parameters()] == names
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert not any(module.training for module in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "blocks.1.up.weight",
        "blocks.1.up.bias",
    ]
    assert model.blocks[0].up is model.blocks[2].up is not model.blocks[1].up
    assert model.head.weight.shape == (64, 16)
    assert "up): ColumnLinear(in_features=16, out_features=64, bias=True, tp=2)" in str(model)
    shapes = {name: placement.shape for name, placement in tpformer.placements(model, Mesh()).items()}
    assert shapes == {name: tuple(p.shape) for name, p in Own().named_parameters()}


def test_a_token_that_nobody_knows_is_named() -> None:
    model = tpformer.parallelize(make(CASES["own"]), CASES["own"].plan, Mesh())
    with pytest.raises(ValueError, match=r"token 101 must be in 0\.\.100"):
        model(torch.tensor([[101]]))
