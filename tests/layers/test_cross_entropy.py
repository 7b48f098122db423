"""The vocabulary-parallel loss against torch's cross entropy of the whole logits: values, gradients, memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import Ranks
from tests.layers.losses import plain_loss
from tests.layers.prove import Results, gradient, interpreted, meshes, noise, on_layouts, prove, take, whole
from tpformer import Axis, Mesh, trace_communication, vocab_parallel_cross_entropy
from tpformer_kernels import Backend

B, S, V = 2, 5, 128


def tensors(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Whole logits with garbage in the columns of padding, and targets, some of them ignored."""
    vocab_size, shape = case.get("vocab_size") or V, case.get("shape", (B, S))
    logits = case.get("scale", 2.0) * noise("logits", *shape, V)
    logits[..., vocab_size:] = case.get("garbage", torch.nan)
    targets = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(3))
    targets.view(-1)[:2] = torch.tensor([0, vocab_size - 1])
    ignored = case.get("ignored", 0)
    targets.view(-1)[len(targets.view(-1)) - ignored :] = case.get("ignore_index", -100)
    if first := case.get("minus_infinity_from"):  # as if those tokens were forbidden
        logits[..., first:] = -torch.inf
        targets = targets.clamp(max=first - 1)
    return logits, targets


def options(case: dict[str, Any]) -> dict[str, Any]:
    names = ("ignore_index", "label_smoothing", "z_loss", "softcap", "reduction", "vocab_size", "inplace")
    return {name: case[name] for name in names if name in case}


def upstream(case: dict[str, Any], shape: torch.Size) -> Tensor:
    """What backward begins with: a number or, without a reduction, a weight for each token, 0 and below too."""
    if case.get("reduction") != "none":
        return torch.tensor(0.7, dtype=torch.float64)
    weights = noise("upstream", *shape)
    weights.view(-1)[:2] = 0.0
    return weights


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "some ignored": {"ignored": 3},
    "ignore_index in the vocabulary": {"ignored": 4, "ignore_index": 7},
    "all ignored": {"ignored": 10, "label_smoothing": 0.1, "z_loss": 0.1},
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.1},
    "padding of nan": {"vocab_size": 101},
    "padding of inf": {"vocab_size": 101, "garbage": torch.inf},
    "padding of 1e30": {"vocab_size": 101, "garbage": 1e30, "label_smoothing": 0.3},
    "slices of padding only": {"vocab_size": 60, "label_smoothing": 0.2},
    "one real column": {"vocab_size": 1},
    "extreme logits": {"scale": 1e4},
    "extreme logits, smoothed": {"scale": 1e4, "label_smoothing": 0.1},
    "softcap": {"softcap": 1.5},
    "softcap, in place": {"softcap": 1.5, "inplace": True, "vocab_size": 60},
    "softcap of large logits": {"softcap": 5.0, "scale": 20.0, "label_smoothing": 0.1},
    "sum": {"reduction": "sum", "ignored": 3},
    "sum, smoothed": {"reduction": "sum", "ignored": 3, "label_smoothing": 0.1, "z_loss": 0.01},
    "none": {"reduction": "none", "ignored": 3},
    "none, in place": {"reduction": "none", "ignored": 3, "vocab_size": 101, "inplace": True},
    "none, smoothed and capped": {"reduction": "none", "softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.01},
    "none, all ignored": {"reduction": "none", "ignored": 10},
    "sum, all ignored": {"reduction": "sum", "ignored": 10},
    "everything": {"vocab_size": 101, "ignored": 3, "label_smoothing": 0.1, "z_loss": 0.01},
    "everything, in place": {"vocab_size": 101, "ignored": 3, "label_smoothing": 0.1, "z_loss": 0.01, "inplace": True},
    "(n, v)": {"shape": (7,), "vocab_size": 101},
    "(a, b, s, v)": {"shape": (2, 1, 3), "vocab_size": 101, "inplace": True},
    "strided": {"strided": True, "vocab_size": 101},
    "strided, in place": {"strided": True, "inplace": True},
    "a slice of -inf": {"minus_infinity_from": 90},
}


def run(name: str, backend: Backend) -> Results:
    case = CASES[name]

    def on(mesh: Mesh, dtype: torch.dtype) -> dict[str, Tensor]:
        logits, targets = tensors(case)
        leaf = take(logits, "features", mesh).to(dtype).contiguous().requires_grad_()
        x = leaf * 1
        if case.get("strided"):
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        loss = vocab_parallel_cross_entropy(x, targets, mesh, **options(case), backend=backend)
        loss.backward(upstream(case, targets.shape).to(dtype))
        return {"loss": loss.detach(), "dlogits": whole(gradient(leaf), "features", mesh)}

    return on_layouts(on, backend)


def reference(case: dict[str, Any]) -> dict[str, Tensor]:
    """torch's cross entropy of the real columns, with the other options written plainly."""
    logits, targets = tensors(case)
    logits.requires_grad_()
    plain: Any = {name: value for name, value in options(case).items() if name != "inplace"}
    loss = plain_loss(logits, targets, plain)
    loss.backward(upstream(case, targets.shape))
    return {"loss": loss, "dlogits": gradient(logits)}


TRITON = ["padding of nan", "slices of padding only", "a slice of -inf", "strided, in place"]
TRITON += ["everything, in place", "none, smoothed and capped"]
RUNS = [(name, "torch") for name in CASES] + [pytest.param(name, "triton", marks=interpreted) for name in TRITON]


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_is_torch_s_cross_entropy(ranks: Ranks, name: str, backend: Backend) -> None:
    prove(ranks, run, reference(CASES[name]), name, backend, backend=backend)


def run_low_precision(dtype: torch.dtype) -> list[tuple[str, Any, Any]]:
    results = []
    for mesh in meshes().values():
        logits, targets = tensors(CASES["everything"])
        x = take(logits, "features", mesh).to(dtype).contiguous().requires_grad_()
        loss = vocab_parallel_cross_entropy(x, targets, mesh, **options(CASES["everything"]))
        loss.backward()
        gathered = whole(gradient(x).double(), "features", mesh)
        results.append((str(loss.dtype), loss.item(), gathered.numpy()))
    return results


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
def test_low_precision_logits_lose_nothing_but_their_own_rounding(
    ranks: Ranks, dtype: torch.dtype, rounding: float
) -> None:
    case = CASES["everything"]
    logits, targets = tensors(case)
    x = logits.to(dtype).double().requires_grad_()
    loss = vocab_parallel_cross_entropy(x, targets, **options(case))  # proven above, in fp64
    loss.backward()
    for results in [run_low_precision(dtype), *ranks(run_low_precision, 4, dtype)]:
        for kind, value, dlogits in results:
            assert kind == "torch.float32"
            assert abs(value / loss.item() - 1) < 1e-6
            torch.testing.assert_close(torch.from_numpy(dlogits), gradient(x), rtol=rounding, atol=1e-7)


def run_counts() -> list[tuple[Any, ...]]:
    seen = []
    for mesh in meshes().values():
        logits, targets = tensors(CASES["everything"])
        x = take(logits, "features", mesh).bfloat16().contiguous().requires_grad_()
        with trace_communication() as trace:
            vocab_parallel_cross_entropy(x, targets, mesh, **options(CASES["everything"])).backward()
        seen.append((mesh.tp.size, [(call.op, call.phase, call.bytes, call.dtype) for call in trace.calls]))
    return seen


def test_exactly_one_collective_of_four_numbers_a_token(ranks: Ranks) -> None:
    for seen in [run_counts(), *ranks(run_counts, 4)]:
        for tp, calls in seen:
            bytes_ = tp * B * S * 4 * 4
            assert calls == ([] if tp == 1 else [("all_gather", "forward", bytes_, "float32")])


@pytest.mark.parametrize("inplace", [False, True])
def test_no_second_copy_of_the_logits_is_kept(inplace: bool) -> None:
    logits, targets = tensors({})
    x = logits.bfloat16().requires_grad_()
    loss = vocab_parallel_cross_entropy(x, targets, label_smoothing=0.1, inplace=inplace)
    saved = loss.grad_fn.saved_tensors  # type: ignore[union-attr]
    own = [t for t in saved if t.data_ptr() == x.data_ptr()]
    assert len(own) == 1
    assert own[0].dtype == torch.bfloat16
    assert all(t.numel() <= B * S for t in saved if t is not own[0])


def test_in_place_writes_the_gradient_over_the_logits_once() -> None:
    logits, targets = tensors({})
    x = logits.clone().requires_grad_() * 1
    addresses: list[int] = []
    x.register_hook(lambda grad: addresses.append(grad.data_ptr()))
    loss = vocab_parallel_cross_entropy(x, targets, inplace=True)
    loss.backward(retain_graph=True)
    assert addresses == [x.data_ptr()]
    assert not torch.equal(x, logits)
    with pytest.raises(RuntimeError, match="in-place loss a second time"):
        loss.backward()


def test_without_in_place_the_logits_stay_and_backward_may_come_twice() -> None:
    logits, targets = tensors({})
    x = logits.clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(x, targets)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(x, logits)
    assert torch.equal(first, second)
    assert first.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("wrong", [-1, 101, 127, -99])
def test_a_target_outside_the_vocabulary_is_named(wrong: int) -> None:
    targets = torch.tensor([[5, -100], [wrong, 100]])
    message = rf"target {wrong} at position 2 must be in 0..100 \(vocab_size 101\) or ignore_index \(-100\)"
    with pytest.raises(ValueError, match=message):
        vocab_parallel_cross_entropy(torch.zeros(2, 2, V), targets, vocab_size=101)


def test_sizes_that_do_not_fit_are_named() -> None:
    logits = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match=r"targets \(3, 2\) must have the shape of logits \(2, 3, 8\) less V"):
        vocab_parallel_cross_entropy(logits, torch.zeros(3, 2, dtype=torch.int64))
    for wrong in (0, 33):
        with pytest.raises(ValueError, match=rf"vocab_size \({wrong}\) must be in 1..32, the columns of all ranks"):
            targets = torch.zeros(2, 3, dtype=torch.int64)
            vocab_parallel_cross_entropy(logits, targets, Mesh(tp=Axis("tp", 4)), vocab_size=wrong)


def test_an_untrained_model_s_loss_is_the_log_of_the_real_vocabulary() -> None:
    loss = vocab_parallel_cross_entropy(torch.zeros(B, S, V), torch.zeros(B, S, dtype=torch.int64), vocab_size=101)
    torch.testing.assert_close(loss, torch.tensor(101.0).log(), rtol=1e-6, atol=0)
