"""The optimizer is AdamW as torch has it, with decay on matrices, clipping by the true norm, and fp32 masters."""

import math

import pytest
import torch
from torch import Tensor, nn

from tests.distributed import Ranks
from tests.proofs.cases import Layout, build, build_random, gpt, llama
from tpformer import Mesh
from tpformer.train.optimizer import Optimizer
from tpformer.train.schedule import OptimizerConfig

FP64 = torch.float64
LOSS = torch.tensor(3.5)


class Parts(nn.Module):
    """A scalar, a vector, a matrix and a table of three dims."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for number, shape in enumerate([(), (5,), (4, 3), (2, 3, 2)]):
            value = torch.randn(shape, generator=generator, dtype=FP64) + 1
            self.register_parameter(f"d{number}", nn.Parameter(value))


def some_gradients(model: nn.Module, seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """A gradient for every parameter, fp32 or fp64."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(p.shape, generator=generator, dtype=torch.promote_types(p.dtype, torch.float32))
        for name, p in model.named_parameters()
    }


def test_it_is_torch_s_adamw_with_decay_on_matrices_only() -> None:
    """Ten steps with a rate that changes, against one written by hand with two groups of parameters."""
    ours, theirs = Parts(), Parts()
    config = OptimizerConfig(weight_decay=0.3, clip_norm=0, betas=(0.8, 0.9), eps=1e-6)
    optimizer = Optimizer(ours, Mesh(), config)
    groups = [
        {"params": [theirs.d0, theirs.d1], "weight_decay": 0.0},
        {"params": [theirs.d2, theirs.d3], "weight_decay": 0.3},
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-6, foreach=False)
    for step in range(10):
        lr = 0.01 * (step + 1)
        for name, gradient in some_gradients(ours, step).items():
            theirs.get_parameter(name).grad = gradient.clone()
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        optimizer.step(some_gradients(ours, step), lr, LOSS)
    for name, p in ours.named_parameters():
        assert torch.allclose(p, theirs.get_parameter(name), rtol=1e-13, atol=0), name


def test_without_a_gradient_matrices_shrink_and_vectors_stay() -> None:
    """In GPT: weights, and the position table, shrink by lr times decay; biases and norms are left alone."""
    model = build_random(gpt(), Mesh(), FP64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, Mesh(), OptimizerConfig(weight_decay=0.5))
    optimizer.step({name: torch.zeros_like(p) for name, p in model.named_parameters()}, 0.1, LOSS)
    for name, p in model.named_parameters():
        vector = name.endswith("bias") or "norm" in name
        assert torch.allclose(p, before[name] * (1 if vector else 0.95), rtol=1e-15, atol=0), name


@pytest.mark.parametrize("largest", [0.0, 0.5, 1e6])
def test_clipping_is_torch_s_by_the_norm_of_everything(largest: float) -> None:
    """torch divides by the norm + 1e-6: that much is put back. A limit of 0, or above the norm, changes nothing."""
    model, twin = Parts(), Parts()
    gradients = some_gradients(model, 1, scale=10)
    for name, gradient in gradients.items():
        twin.get_parameter(name).grad = gradient.clone()
    expected = nn.utils.clip_grad_norm_(twin.parameters(), largest or math.inf).item()
    norm, loss, *_ = Optimizer(model, Mesh(), OptimizerConfig(clip_norm=largest)).step(gradients, 0.01, LOSS)
    assert norm == pytest.approx(expected, rel=1e-14)
    assert loss == 3.5
    for name, gradient in gradients.items():
        clipped = twin.get_parameter(name).grad
        assert clipped is not None
        factor = (norm + 1e-6) / norm if 0 < largest < norm else 1.0
        assert torch.allclose(gradient, clipped * factor, rtol=1e-13, atol=0), name


def test_every_field_of_the_config_matters() -> None:
    """Two steps end elsewhere if one of them is changed: none is forgotten on the way to torch."""
    changes = [{}, {"betas": (0.5, 0.95)}, {"betas": (0.9, 0.5)}, {"eps": 1e-2}, {"weight_decay": 0.2}]
    changes += [{"clip_norm": 0.1}, {"clip_norm": 0.0}]
    ends = []
    for change in changes:
        model = Parts()
        optimizer = Optimizer(model, Mesh(), OptimizerConfig(**change))  # type: ignore[arg-type]
        for step in range(2):
            optimizer.step(some_gradients(model, step, 10.0 ** (1 - step)), 0.1, LOSS)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]).tolist())
    assert len(set(map(tuple, ends))) == len(changes)


# what is not finite


def poisoned(layout: Layout, rank: int, value: float, where: str) -> tuple[str, bool]:
    """On a rank: the error of a step in which one rank's gradient or loss holds `value`, and whether nothing moved."""
    mesh = layout.mesh()
    model = build(llama(num_kv_heads=2), mesh)
    optimizer = Optimizer(model, mesh, OptimizerConfig())
    optimizer.step(some_gradients(model, 0), 0.1, LOSS)
    before = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    gradients, loss = some_gradients(model, 1), LOSS
    if mesh.world.rank == rank and where == "gradient":
        gradients["blocks.1.mlp.down.weight"][3, 1] = value
    elif mesh.world.rank == rank:
        loss = torch.tensor(value)
    try:
        optimizer.step(gradients, 0.1, loss)
    except FloatingPointError as error:
        after = optimizer.state()
        still = all(torch.equal(tensor, after[name]) for name, tensor in before.items()) and optimizer.steps == 1
        return str(error), still
    return "nothing was raised", False


@pytest.mark.parametrize(
    ("layout", "rank", "value", "where"),
    [
        (Layout(1), 0, math.nan, "gradient"),
        (Layout(2), 1, math.inf, "gradient"),
        (Layout(2), 1, math.nan, "loss"),
        (Layout(2, 2), 0, -math.inf, "gradient"),
        (Layout(2, 2), 1, math.nan, "gradient"),
        (Layout(2, 2), 3, math.inf, "loss"),
    ],
    ids=str,
)
def test_one_rank_s_bad_number_stops_every_rank_before_a_weight_changes(
    layout: Layout, rank: int, value: float, where: str, ranks: Ranks
) -> None:
    errors = ranks(poisoned, layout.world_size, layout, rank, value, where)
    assert len({text for text, _ in errors}) == 1
    for text, still in errors:
        assert "not finite at step 2" in text
        assert still


# saving and going on


def test_a_state_taken_over_goes_on_bit_for_bit() -> None:
    straight, first, second = Parts(), Parts(), Parts()
    config = OptimizerConfig(lr=0.1)
    reference, optimizer = Optimizer(straight, Mesh(), config), Optimizer(first, Mesh(), config)
    for step in range(4):
        reference.step(some_gradients(straight, step), 0.1, LOSS)
    for step in range(2):
        optimizer.step(some_gradients(first, step), 0.1, LOSS)
    other = Optimizer(second, Mesh(), config)
    saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    assert sorted(saved) == sorted(f"{kind}/d{i}" for kind in ("weight", "exp_avg", "exp_avg_sq") for i in range(4))
    other.load_state(saved, 2)
    for step in range(2, 4):
        other.step(some_gradients(second, step), 0.1, LOSS)
    for name, p in straight.named_parameters():
        assert torch.equal(p, second.get_parameter(name)), name
    assert other.steps == reference.steps == 4


def test_a_state_before_the_first_step_is_the_weights_and_zeros() -> None:
    model = Parts()
    state = Optimizer(model, Mesh(), OptimizerConfig()).state()
    for name, p in model.named_parameters():
        assert torch.equal(state[f"weight/{name}"], p)
        assert not state[f"exp_avg/{name}"].any()
        assert not state[f"exp_avg_sq/{name}"].any()


def test_what_is_frozen_stays() -> None:
    model = Parts()
    frozen = model.get_parameter("d2").requires_grad_(False)
    before = frozen.detach().clone()
    optimizer = Optimizer(model, Mesh(), OptimizerConfig())
    gradients = some_gradients(model, 0)
    del gradients["d2"]  # as GradientBuckets does
    optimizer.step(gradients, 0.1, LOSS)
    assert torch.equal(frozen, before)
    assert not torch.equal(model.get_parameter("d1"), Parts().get_parameter("d1"))
