"""When the gradients that matmuls sum are sent to the other replicas: as soon as they are whole, and never before."""

from contextlib import ExitStack
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch

import tpformer
from tests.distributed import Ranks
from tests.parallel.test_gradient_sums import LOSSES, D, F, build, error, inputs, of_autograd, step
from tpformer import Mesh
from tpformer.collectives import Pending, all_reduce_
from tpformer.layers.gradient_sum import GradientSum
from tpformer.parallel import data
from tpformer.parallel.data import GradientBuckets

SIZES = {"down.weight": D * F, "apart.weight": 2 * D * F, "packed.bias": 2 * F, "packed.weight": 2 * D * F}
SIZES["up.weight"] = D * F
BYTES = [8 * size for size in SIZES.values()]
"""What is sent where each parameter has a bucket of its own, in order."""


class Found(NamedTuple):
    """Bytes sent during each micro-batch's backward and by finish(), and how far the sums are from autograd's."""

    backward: list[list[int]]
    finish: list[int]
    error: float
    message: str = ""


def on_ranks(ranks: Ranks, *args: object) -> list[Found]:
    """run(*args) on two replicas."""
    return [Found(*found) for found in ranks(run, 2, *args)]


def run(loss: str, bucket_bytes: int = 1, parts: int = 2, without: tuple[str, ...] = (), idle: str = "") -> tuple:
    """On a rank of dp 2: a step, both replicas on the same samples; the second of two, or the first that fails.

    The result is a Found, as it travels. without: methods of the sums that do nothing; then what is sent
    is sent at once.
    idle: forwards that no backward follows, of "both" ranks or "one".
    """
    mesh = Mesh.create(dp=2, device="cpu")
    model = build(mesh)
    samples, found = inputs(parts), Found([], [], 0)
    expected = of_autograd(model, samples, LOSSES[loss])
    buckets = GradientBuckets(model, mesh, bucket_bytes)
    with ExitStack() as stack:
        for name in without:
            stack.enter_context(patch.object(GradientSum, name, lambda *x: None))
            # sent when it is started, as it may be
            stack.enter_context(
                patch.object(data, "start_all_reduce", lambda x, axis: Pending(None, all_reduce_(x, axis)))
            )
        for _ in range(2):
            backward: list[list[int]] = []
            for number, (x, dy) in enumerate(samples):
                buckets.start(last=number == parts - 1)
                value = LOSSES[loss](model, x, dy) / 2
                if idle == "both" or (idle == "one" and mesh.dp.rank == 0):
                    model(x)
                with torch.no_grad():
                    model(x)
                with tpformer.trace_communication() as trace:
                    try:
                        value.backward()
                    except RuntimeError as failure:
                        return backward, [], torch.inf, str(failure)
                backward.append([call.bytes for call in trace.calls])
            with tpformer.trace_communication() as trace:
                sums = {name: total.clone() for name, total in buckets.finish().items()}
            found = Found(backward, [call.bytes for call in trace.calls], error(sums, expected))
    return tuple(found)


SENT_AT_ONCE = ["once", "twice", "penalised", "checkpointed", "checkpointed twice", "checkpointed, reentrant"]


@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
@pytest.mark.parametrize("loss", SENT_AT_ONCE)
def test_every_sum_is_sent_in_the_last_backward(loss: str, bucket_bytes: int, ranks: Ranks) -> None:
    """After its last use, whatever uses it; in one order. Forwards that no backward follows delay nothing."""
    for found in on_ranks(ranks, loss, bucket_bytes, 2, (), "one"):
        assert (found.backward[0], found.finish, found.message) == ([], [], "")
        assert found.backward[1] == (BYTES if bucket_bytes == 1 else [sum(BYTES)])
        assert found.error < 1e-12


REENTRANT = "checkpointed twice, reentrant"


def test_segments_with_a_backward_each_are_refused(ranks: Ranks) -> None:
    """A reentrant checkpoint runs a backward of its own, after which nothing says that another one comes."""
    for found in on_ranks(ranks, REENTRANT):
        assert "a gradient came after its sum had been sent" in found.message


def test_without_the_refusal_sums_are_wrong(ranks: Ranks) -> None:
    """Negative control."""
    for found in on_ranks(ranks, REENTRANT, 1, 1, ("_check_open",)):
        assert found.error > 0.01


def backward_twice(dp: int) -> tuple[float, str]:
    """On a rank: how far the sums of a loss that is differentiated twice are from twice the gradient."""
    mesh = Mesh.create(dp=dp, device="cpu") if dp > 1 else Mesh()
    model, (sample,) = build(mesh), inputs(1)
    expected = {name: 2 * gradient for name, gradient in of_autograd(model, [sample], LOSSES["once"]).items()}
    buckets = GradientBuckets(model, mesh, bucket_bytes=1)
    loss = LOSSES["once"](model, *sample) / dp
    loss.backward(retain_graph=True)
    try:
        loss.backward()
    except RuntimeError as failure:
        return torch.inf, str(failure)
    return error(buckets.finish(), expected), ""


def test_backward_twice_is_refused_once_the_sum_is_sent(ranks: Ranks) -> None:
    """On one replica nothing is sent, and gradients add up as autograd's do."""
    for _, message in ranks(backward_twice, 2, 2):
        assert "a gradient came after its sum had been sent to the other ranks: was backward run twice" in message
    assert backward_twice(1)[0] < 1e-12


def test_a_refused_step_can_be_finished_and_the_next_one_is_right(ranks: Ranks) -> None:
    for found in ranks(refused_then_right, 2):
        assert found < 1e-12


def refused_then_right() -> float:
    """On a rank of dp 2: the error of a step after one that was refused."""
    mesh = Mesh.create(dp=2, device="cpu")
    model = build(mesh)
    expected = of_autograd(model, inputs(2), LOSSES["once"])
    buckets = GradientBuckets(model, mesh, bucket_bytes=1)
    loss = LOSSES["once"](model, *inputs(1)[0])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="after its sum had been sent"):
        loss.backward()
    buckets.finish()
    model.zero_grad()
    return error(step(model, buckets, inputs(2), lambda *x: LOSSES["once"](*x) / 2), expected)
