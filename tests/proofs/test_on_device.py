"""On a GPU the model is what it is on a CPU: loss, logits, gradients and trained weights, kernels on and off.

Without a GPU the same comparisons run between Triton's interpreter and the references, so that the file itself is
known to work; what only a GPU can show is skipped there.
"""

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist

import tpformer
from tests.proofs.cases import TOLERANCE, Config, Measured, build, build_random, gpt, llama, mismatches, random_batch
from tpformer import Key, Mesh
from tpformer.parallel.data import GradientBuckets
from tpformer.train.optimizer import Optimizer
from tpformer.train.schedule import OptimizerConfig
from tpformer.train.step import StepOptions, train_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no GPU")
quiet = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # numpy, interpreting sigmoid

MODELS: dict[str, Config] = {
    "llama": llama(num_kv_heads=2, num_layers=1, vocab_size=257),
    "qwen3 with dropout": llama(num_kv_heads=2, qk_norm=True, head_dim=12, num_layers=1, dropout=0.2),
    "gpt": gpt(num_layers=1, dropout=0.2),
}


def measure(config: Config, device: torch.device, dtype: torch.dtype) -> Measured:
    """Loss, logits and gradients of one process; dropout is on where the config has it."""
    model = build_random(config, Mesh(device=device), dtype)
    tokens, targets = (x.to(device) for x in random_batch(config.vocab_size))
    loss = model.loss(tokens, targets, key=Key(3), z_loss=1e-3)
    loss.backward()
    with torch.no_grad():
        found = {"logits": model.full_logits(tokens), "loss": loss}
    found |= {name: tpformer.full_gradient(model, name) for name, _ in model.named_parameters()}
    return {name: x.detach().double().cpu().numpy() for name, x in found.items()}


def train(config: Config, device: torch.device, dtype: torch.dtype) -> Measured:
    """Every weight after three clipped AdamW steps of two micro-batches."""
    mesh = Mesh(device=device)
    model = build_random(config, mesh, dtype)
    buckets = GradientBuckets(model, mesh)
    optimizer = Optimizer(model, mesh, OptimizerConfig(lr=0.01, eps=1e-4, weight_decay=0.1, clip_norm=1.0))
    generator = torch.Generator().manual_seed(5)
    for step in range(3):
        samples = torch.randint(config.vocab_size, (4, 9), generator=generator)
        train_step(model, buckets, optimizer, samples, StepOptions(micro_batch_size=2, lr=0.01, key=Key(7).fold(step)))
    found = {name: tpformer.full_parameter(model, name).detach() for name, _ in model.named_parameters()}
    return {name: x.double().cpu().numpy() for name, x in found.items()}


@quiet
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_logits_and_gradients_are_those_of_fp64_on_a_cpu(name: str, backend: str) -> None:
    config = dataclasses.replace(MODELS[name], backend=backend)  # type: ignore[arg-type]
    expected = measure(MODELS[name], torch.device("cpu"), torch.float64)
    assert mismatches(expected, measure(config, DEVICE, torch.float32), TOLERANCE[torch.float32]) == []


@quiet
@pytest.mark.parametrize("name", MODELS)
def test_three_steps_end_in_the_weights_of_fp64_on_a_cpu(name: str) -> None:
    config = dataclasses.replace(MODELS[name], backend="triton")
    expected = train(MODELS[name], torch.device("cpu"), torch.float64)
    assert mismatches(expected, train(config, DEVICE, torch.float32), TOLERANCE[torch.float32]) == []


@needs_gpu
@pytest.mark.parametrize("name", MODELS)
def test_bf16_errs_no_more_than_twice_torch_s_bf16(name: str) -> None:
    exact = measure(MODELS[name], torch.device("cpu"), torch.float64)
    ours, theirs = (
        measure(dataclasses.replace(MODELS[name], backend=backend), DEVICE, torch.bfloat16)
        for backend in ("triton", "torch")
    )
    for key, truth in exact.items():
        scale = np.abs(truth).max()
        errors = [np.sqrt(np.square(found[key] - truth).mean()) / scale for found in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] + 1e-3, f"{key}: {errors}"


@needs_gpu
@pytest.mark.parametrize("name", MODELS)
def test_initial_weights_are_those_of_a_cpu(name: str) -> None:
    on_gpu, on_cpu = (build(MODELS[name], Mesh(device=torch.device(d))).state_dict() for d in (DEVICE, "cpu"))
    for key, weight in on_cpu.items():
        torch.testing.assert_close(on_gpu[key].cpu(), weight, rtol=0, atol=1e-7)


@needs_gpu
def test_one_nccl_rank_is_one_process(tmp_path_factory: pytest.TempPathFactory) -> None:
    """With a process group of one, and sequence parallelism asked for: the same loss."""
    config = MODELS["llama"]
    tokens, targets = (x.to(DEVICE) for x in random_batch(config.vocab_size))
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        mesh = Mesh.create(tp=1, sequence_parallel=True)
        grouped = build_random(config, mesh, torch.float32).loss(tokens, targets)
    finally:
        dist.destroy_process_group()
    alone = build_random(config, Mesh(device=DEVICE), torch.float32).loss(tokens, targets)
    assert torch.equal(grouped, alone)


@needs_gpu
def test_the_whole_step_compiles_without_a_graph_break() -> None:
    config = dataclasses.replace(MODELS["llama"], backend="triton")
    model = build_random(config, Mesh(device=DEVICE), torch.bfloat16)
    tokens, targets = (x.to(DEVICE) for x in random_batch(config.vocab_size))
    eager = model.loss(tokens, targets)
    compiled = torch.compile(model.loss, fullgraph=True)(tokens, targets)
    compiled.backward()
    assert compiled.item() == pytest.approx(eager.item(), rel=1e-2)
