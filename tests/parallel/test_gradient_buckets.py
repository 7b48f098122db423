"""Gradient buckets: every gradient summed over the replicas exactly once, in fp32, in one order, during backward."""

import pytest
import torch
from torch import Tensor, nn

import tpformer
from tests.distributed import Ranks
from tests.proofs.cases import llama
from tpformer import Llama, Mesh
from tpformer.parallel.data import GradientBuckets
from tpformer.trace import Call

FP64 = torch.float64
CONFIG = llama(num_kv_heads=2)


def two_replicas() -> Mesh:
    """On a rank: the mesh of dp 2."""
    return Mesh.create(dp=2, device="cpu")


def batch() -> Tensor:
    """Samples (8, 9) of 101 tokens."""
    return torch.randint(101, (8, 9), generator=torch.Generator().manual_seed(3))


def accumulate(
    model: Llama, buckets: GradientBuckets, samples: Tensor, parts: int
) -> tuple[list[list[Call]], dict[str, Tensor]]:
    """The collectives of each micro-batch's backward, and last those of finish(); and the gradients."""
    calls = []
    for number, part in enumerate(samples.chunk(parts)):
        buckets.start(last=number == parts - 1)
        loss = model.loss(part[:, :-1], part[:, 1:]) / parts / model.mesh.dp.size
        with tpformer.trace_communication() as trace:
            loss.backward()
        calls.append(trace.calls)
    with tpformer.trace_communication() as trace:
        gradients = buckets.finish()
    return [*calls, trace.calls], gradients


# 1. what is communicated, when and in which order


def bucket_calls(bucket_bytes: int) -> list[list[Call]]:
    """On a rank of dp 2: the calls of two micro-batches and of finish()."""
    mesh = two_replicas()
    model = Llama(CONFIG, mesh)
    return accumulate(model, GradientBuckets(model, mesh, bucket_bytes), batch().chunk(2)[mesh.dp.rank], 2)[0]


PARAMETERS = [p.numel() for p in Llama(CONFIG).parameters()]


@pytest.mark.parametrize("bucket_bytes", [1, 20_000, 1 << 20])
def test_one_all_reduce_a_bucket_in_the_last_backward_only(bucket_bytes: int, ranks: Ranks) -> None:
    """Each rank issues the same ones in the same order, from the last parameter to the first."""
    first, second = ranks(bucket_calls, 2, bucket_bytes)
    assert first == second
    before, last, finish = first
    assert (before, finish) == ([], [])
    assert {(call.op, call.axis, call.phase, call.dtype) for call in last} == {
        ("all_reduce", "dp", "backward", "float32")
    }
    found = [call.bytes for call in last]
    sizes = [4 * number for number in reversed(PARAMETERS)]
    if bucket_bytes == 1:
        assert found == sizes
    elif bucket_bytes == 1 << 20:
        assert found == [sum(sizes)]
    else:
        assert sum(found) == sum(sizes)
        assert 2 < len(found) < len(sizes)
        assert min(found[:-1]) >= bucket_bytes  # each is full, but for the last one


class Branches(nn.Module):
    """Three vectors whose gradients come in the order that `order` says, last first."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abc":
            self.register_parameter(name, nn.Parameter(torch.ones(5, dtype=FP64)))

    def loss(self, weights: dict[str, float], order: str) -> Tensor:
        """The sum over the branches of weight times vector; a branch left out of `order` takes no part."""
        return torch.stack([weights[name] * self.get_parameter(name).sum() for name in order]).sum()


def branch_gradients(orders: list[list[str]]) -> list[dict[str, Tensor]]:
    """On a rank of dp 2: the gradients of one step after another; orders[step][rank] says what takes part."""
    mesh = two_replicas()
    model = Branches()
    buckets = GradientBuckets(model, mesh, bucket_bytes=1)
    rank, found = mesh.dp.rank, []
    for order in orders:
        buckets.start(last=True)
        weights = {name: 10.0**i + 2000 * rank for i, name in enumerate("abc")}
        model.loss(weights, order[rank]).backward()
        found.append({name: gradient.clone() for name, gradient in buckets.finish().items()})
    return found


def weights_of(*parts: float) -> dict[str, Tensor]:
    """Gradients of Branches."""
    return {name: torch.full((5,), part, dtype=FP64) for name, part in zip("abc", parts, strict=True)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """The same names and, bit for bit, tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("orders", [["abc", "cba"], ["bca", "abc"], ["cab", "bac"]], ids="-".join)
def test_ranks_whose_gradients_come_in_another_order_sum_the_same_buckets(orders: list[str], ranks: Ranks) -> None:
    for (found,) in ranks(branch_gradients, 2, [orders]):
        assert same(found, weights_of(2002, 2020, 2200))


def test_parameters_that_take_no_part_have_zero_and_never_an_old_gradient(ranks: Ranks) -> None:
    steps = [["abc", "abc"], ["ac", "ac"], ["a", "ab"], ["abc", "abc"]]
    expected = [
        weights_of(2002, 2020, 2200),
        weights_of(2002, 0, 2200),
        weights_of(2002, 2010, 0),  # the second vector on one replica only
        weights_of(2002, 2020, 2200),
    ]
    for found in ranks(branch_gradients, 2, steps):
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def used_early() -> dict[str, Tensor]:
    """On a rank of dp 2: a vector takes part in the first of three micro-batches only, another in the middle one."""
    mesh = two_replicas()
    model = Branches()
    buckets = GradientBuckets(model, mesh, bucket_bytes=1)
    for number, order in enumerate(("ac", "bc", "c")):
        buckets.start(last=number == 2)
        model.loss({"a": 1.0, "b": 3.0, "c": 5.0 + mesh.dp.rank}, order).backward()
    return buckets.finish()


def test_what_only_an_early_micro_batch_uses_is_summed_too(ranks: Ranks) -> None:
    for found in ranks(used_early, 2):
        assert same(found, weights_of(2, 6, 33))


# 2. what comes out


def whole_gradients(bucket_bytes: int, parts: int) -> list[dict[str, Tensor]]:
    """On a rank of dp 2: the gradients of two equal steps."""
    mesh = two_replicas()
    model = Llama(CONFIG, mesh).double()
    buckets = GradientBuckets(model, mesh, bucket_bytes)
    found = []
    for _ in range(2):
        _, gradients = accumulate(model, buckets, batch().chunk(2)[mesh.dp.rank], parts)
        assert all(p.grad is None for p in model.parameters()), "the model keeps no gradient beside the buckets"
        found.append({name: gradient.clone() for name, gradient in gradients.items()})
    return found


@pytest.mark.parametrize(("bucket_bytes", "parts"), [(1, 1), (4096, 4), (1 << 20, 2)])
def test_the_sum_is_the_whole_batch_s_gradient(bucket_bytes: int, parts: int, ranks: Ranks) -> None:
    """That of autograd on one process without buckets, in each of two steps."""
    model = Llama(CONFIG).double()
    model.loss(batch()[:, :-1], batch()[:, 1:]).backward()
    for steps in ranks(whole_gradients, 2, bucket_bytes, parts):
        for found in steps:
            assert found.keys() == dict(model.named_parameters()).keys()
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                error = (found[name] - parameter.grad).abs().max() / parameter.grad.abs().max()
                assert error <= 1e-12, name


def test_bf16_gradients_add_up_in_fp32() -> None:
    """1 and then 300 times 2^-9, which bf16 would lose each time: the sum is exact."""
    model = nn.Linear(4, 1, bias=False).bfloat16()
    buckets = GradientBuckets(model, Mesh())
    for number in range(301):
        buckets.start(last=number == 300)
        model(torch.full((1, 4), 2.0**-9 if number else 1.0, dtype=torch.bfloat16)).sum().backward()
    (gradient,) = buckets.finish().values()
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, torch.full((1, 4), 1 + 300 * 2.0**-9))
    assert torch.tensor(1.0, dtype=torch.bfloat16) + 2.0**-9 == 1  # what is lost otherwise


def test_a_bf16_model_s_micro_batches_add_up_in_fp32() -> None:
    """The sum is that of each micro-batch's own bf16 gradients, taken in fp32 without any buckets."""
    model = Llama(CONFIG).bfloat16()
    expected = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for part in batch().chunk(8):
        model.zero_grad()
        (model.loss(part[:, :-1], part[:, 1:]) / 8).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            expected[name] += p.grad
    model.zero_grad()
    _, found = accumulate(model, GradientBuckets(model, Mesh()), batch(), 8)
    assert same(found, expected)


def test_each_dtype_has_buckets_of_its_own(ranks: Ranks) -> None:
    """fp64 is not rounded, and bf16 and fp32 are fp32."""
    for found in ranks(mixed_gradients, 2):
        assert [(name, gradient.dtype) for name, gradient in sorted(found.items())] == [
            ("a", torch.float64),
            ("b", torch.float32),
            ("c", torch.float32),
        ]
        assert torch.equal(found["a"], torch.full((3,), 2 * (1 + 2.0**-50), dtype=FP64))
        assert found["b"].tolist() == found["c"].tolist() == [2.0] * 3


def mixed_gradients() -> dict[str, Tensor]:
    """On a rank of dp 2: gradients of 1 (a: and 2^-50 more) of parameters of three dtypes."""
    model = nn.Module()
    for name, dtype in (("a", torch.float64), ("b", torch.float32), ("c", torch.bfloat16)):
        model.register_parameter(name, nn.Parameter(torch.ones(3, dtype=dtype)))
    buckets = GradientBuckets(model, two_replicas())
    parts = [p.double().sum() * (1 + 2.0**-50 if name == "a" else 1) for name, p in model.named_parameters()]
    torch.stack(parts).sum().backward()
    return buckets.finish()


def test_frozen_parameters_are_left_out_and_closing_takes_the_hooks_off() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    model = nn.Sequential(first, second)
    first.requires_grad_(False)
    buckets = GradientBuckets(model, Mesh())
    model(torch.ones(1, 3)).sum().backward()
    assert buckets.finish().keys() == {"1.weight", "1.bias"}
    buckets.close()
    model(torch.ones(1, 3)).sum().backward()
    assert second.bias.grad is not None
    assert torch.equal(second.bias.grad, torch.ones(3))
