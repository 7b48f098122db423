"""Every driver of a peer runs the plain model: one loss and all gradients, on one rank and on two."""

import importlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.peers import plain
from benchmarks.peers.plain import PlainLlamaConfig
from benchmarks.peers.step import Step, installed
from benchmarks.tensor_parallel import AGREEMENT
from tests.distributed import Ranks
from tpformer import Llama, LlamaConfig, Mesh, full_parameter, trace_communication

SHAPE = PlainLlamaConfig(
    vocab_size=256,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_hidden_size=96,
    max_seq_len=32,
)
CPU = torch.device("cpu")
PACKAGES = {"plain": "torch", "dtensor": "torch", "fsdp2": "torch", "huggingface_tp": "transformers"}
OTHERS = {
    "megatron": "megatron-core",
    "megatron_layers": "megatron-core",
    "torchtitan": "torchtitan",
    "picotron": "picotron",
}
"""Not needed by the tests, which run them where they are installed; their stand-ins want a process of their own."""
EXACT = {"plain", "dtensor", "fsdp2"}
"""Those whose arithmetic is fp64 throughout, if the weights are; the others' norms are fp32."""


def is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


KINDS = [*PACKAGES, *(kind for kind, package in OTHERS.items() if is_installed(package))]


def launch(ranks: Ranks, kind: str, degree: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """fn(*args) on every rank."""
    if kind in PACKAGES:
        return ranks(fn, degree, *args)
    own = Ranks()
    try:
        return own(fn, degree, *args)
    finally:
        own.close()


def driver(kind: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.peers.{kind}")


def batch() -> tuple[Tensor, Tensor]:
    """Tokens and targets, each (2, 32): of full length, as picotron wants them."""
    text = torch.randint(SHAPE.vocab_size, (2, 33), generator=torch.Generator().manual_seed(1))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    """tpformer's whole tensors, redrawn so large that an error in any of them shows."""
    generator = torch.Generator().manual_seed(0)
    model = Llama(LlamaConfig(**vars(SHAPE)), Mesh(), seed=0)
    full = {name: full_parameter(model, name).detach() for name, _ in model.named_parameters()}
    return {
        name: (0.2 * torch.randn(tensor.shape, generator=generator) + ("norm" in name)).to(dtype)
        for name, tensor in full.items()
    }


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def errors(step: Step, full: dict[str, Tensor]) -> dict[str, float]:
    """How far, relatively, a step's loss and each of its gradients lie from the plain model's in fp64."""
    model = plain.with_weights(SHAPE, CPU, {name: tensor.double() for name, tensor in full.items()})
    expected = model.loss(*batch())
    expected.backward()
    step(*batch())
    found = {"loss": error(step(*batch()), expected.detach())}  # the second step's: no gradient is left from the first
    gradients = step.gradients()
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert gradients[name].dtype == next(iter(full.values())).dtype
        found[name] = error(gradients[name], parameter.grad)
    return found


def compare(kind: str, degree: int, dtype: torch.dtype) -> dict[str, float]:
    """On each rank."""
    full = weights(dtype)
    return errors(driver(kind).build(SHAPE, degree, CPU, full), full)


def worst(found: list[dict[str, float]]) -> tuple[float, float]:
    """The largest error of the loss and of a gradient, on any rank."""
    return max(x["loss"] for x in found), max(value for x in found for name, value in x.items() if name != "loss")


RUNS = [(kind, degree) for kind in KINDS for degree in (1, 2) if (kind, degree) != ("plain", 2)]


@pytest.mark.parametrize(("kind", "degree"), RUNS)
def test_a_driver_runs_the_plain_model(ranks: Ranks, kind: str, degree: int) -> None:
    loss, gradient = worst(launch(ranks, kind, degree, compare, kind, degree, torch.float32))
    assert loss < 1e-6
    assert gradient < 1e-5


@pytest.mark.parametrize(("kind", "degree"), [(kind, degree) for kind, degree in RUNS if kind in EXACT])
def test_it_is_exact_in_fp64(ranks: Ranks, kind: str, degree: int) -> None:
    assert max(worst(ranks(compare, degree, kind, degree, torch.float64))) < 1e-10


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_in_bf16_it_is_as_exact_as_the_plain_model(ranks: Ranks, kind: str) -> None:
    loss, gradient = worst(launch(ranks, kind, 2, compare, kind, 2, torch.bfloat16))
    plain_loss, plain_gradient = worst(ranks(compare, 1, "plain", 1, torch.bfloat16))
    assert max(loss, plain_loss) < AGREEMENT["bfloat16"][0]
    assert gradient < 1.5 * plain_gradient


COLLECTIVES = {  # of one step on two ranks: of the whole model, and once for each layer
    "dtensor": (
        {"all_reduce forward": 4, "all_reduce backward": 1},
        {"all_reduce forward": 2, "all_reduce backward": 2},
    ),
    "fsdp2": (
        {"all_gather forward": 1, "reduce_scatter backward": 1, "all_reduce forward": 1},
        {"all_gather forward": 1, "all_gather backward": 1, "reduce_scatter backward": 1},
    ),
    "huggingface_tp": (
        {"all_reduce forward": 1, "all_gather forward": 1, "all_reduce backward": 1},
        {"all_reduce forward": 2, "all_reduce backward": 5},
    ),
}
COLLECTIVES |= dict.fromkeys(("megatron", "megatron_layers", "torchtitan"), COLLECTIVES["dtensor"])
COLLECTIVES["picotron"] = COLLECTIVES["huggingface_tp"]


def communicate(kind: str) -> tuple[Counter[str], int]:
    """On each of two ranks: the collectives of one step, and the numbers that it holds of the parameters."""
    step = driver(kind).build(SHAPE, 2, CPU, weights(torch.float32))
    with trace_communication() as trace:
        step(*batch())
    parameters = [p.to_local() if isinstance(p, DTensor) else p for p in step.model.parameters()]
    return Counter(f"{call.op} {call.phase}" for call in trace.calls), sum(p.numel() for p in parameters)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_it_is_cut_in_two(ranks: Ranks, kind: str) -> None:
    """A driver that left the model whole on every rank would have the right loss too."""
    once, per_layer = COLLECTIVES[kind]
    expected = Counter(once)
    for _ in range(SHAPE.num_layers):
        expected += Counter(per_layer)
    model = plain.PlainLlama(SHAPE)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    matrices = sum(p.numel() for p in model.parameters()) - norms
    for calls, held in launch(ranks, kind, 2, communicate, kind):
        assert calls == expected
        assert held == matrices // 2 + (norms // 2 if kind == "fsdp2" else norms)


def compare_spoiled(kind: str, control: str) -> dict[str, float]:
    """On each of two ranks: one thing is wrong, and the rest is right."""
    full = weights(torch.float32)
    given = dict(full)
    if control == "one weight's gate and up change places":
        given["blocks.1.mlp.gate_up.weight"] = (
            full["blocks.1.mlp.gate_up.weight"].unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        )
    if control == "one weight's heads change places":
        given["blocks.0.attention.qkv.weight"] = full["blocks.0.attention.qkv.weight"].roll(SHAPE.head_dim, 0)
    step = driver(kind).build(SHAPE, 2, CPU, given)
    if control == "one norm's gradient is a part":
        name = "blocks.0.attention_norm.weight"
        right = step.gradients
        step = Step(step.model, step.forward_backward, lambda: right() | {name: right()[name] / 2})
    return errors(step, full)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
@pytest.mark.parametrize(
    "control",
    [
        "one weight's gate and up change places",
        "one weight's heads change places",
        "one norm's gradient is a part",
    ],
)
def test_the_comparison_sees_what_is_wrong(ranks: Ranks, kind: str, control: str) -> None:
    loss, gradient = worst(launch(ranks, kind, 2, compare_spoiled, kind, control))
    assert gradient > 1e-2
    assert loss > 1e-4 or control == "one norm's gradient is a part"


def build_for_three(kind: str) -> str:
    """On each of two ranks: what is said."""
    with pytest.raises(ValueError) as caught:
        driver(kind).build(SHAPE, 3, CPU, weights(torch.float32))
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_degree_is_the_number_of_ranks(ranks: Ranks, kind: str) -> None:
    for said in launch(ranks, kind, 2, build_for_three, kind):
        assert said == f"{driver(kind).NAME}: degree 3 needs as many ranks, and this process group has 2"


def test_plain_is_one_process(ranks: Ranks) -> None:
    with pytest.raises(RuntimeError, match="plain PyTorch is one process, not 2"):
        ranks(compare, 2, "plain", 2, torch.float32)


def test_samples_that_replicas_cannot_share_out_are_refused(ranks: Ranks) -> None:
    ranks(share_out_three, 2)


def share_out_three() -> None:
    step = driver("fsdp2").build(SHAPE, 2, CPU, weights(torch.float32))
    with pytest.raises(ValueError, match="torch FSDP2: 3 samples cannot be shared out evenly over 2 replicas"):
        step(*torch.zeros(2, 3, 8, dtype=torch.int64))


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", nothing)
    for kind, package in (PACKAGES | OTHERS).items():
        if package != "torch":
            for attempt in (driver(kind).version, partial(driver(kind).build, SHAPE, 1, CPU, {})):
                with pytest.raises(ImportError) as caught:
                    attempt()
                assert str(caught.value).startswith(f"{package} is not installed; ")
                assert "\n" not in str(caught.value)


def test_an_installed_package_has_its_version() -> None:
    assert installed("torch") == torch.__version__
    for kind in PACKAGES | OTHERS:
        assert driver(kind).AXIS in ("tp", "dp")
        assert driver(kind).gemm_backend(torch.device("cuda")) == "cuBLAS"


def test_importing_a_driver_imports_no_peer() -> None:
    """In a process of its own, where nothing else has imported one."""
    program = f"""
import sys, importlib
for kind in {sorted(PACKAGES | OTHERS)}:
    importlib.import_module("benchmarks.peers." + kind)
print(sorted({{name.split(".")[0] for name in sys.modules}} & {{"transformers", "megatron", "torchtitan", "picotron"}}))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
