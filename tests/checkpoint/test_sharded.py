"""Whole runs: every layout saves the same bytes and reads them, bit for bit; transformers opens them as they are."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tpformer
from tests.distributed import Ranks
from tests.proofs.cases import Measured
from tests.train.runs import KilledTrainer, config, corpus, records, resumed
from tpformer import Mesh, ParallelConfig
from tpformer.placement import gather_full
from tpformer.train.trainer import Trainer

SHARED = ParallelConfig(tp=2, dp=2, dp_mode="fsdp")
WROTE = ("checksums.json", "meta.json")  # who did, and in which chunks


def trainer(parallel: ParallelConfig, directory: Path, resume: bool, **model: Any) -> KilledTrainer:
    """On a rank: a run on this layout; the held-out samples are no multiple of the replicas' batches."""
    settings = config("gpt" if model.pop("gpt", False) else "llama", eval_samples=9, checkpoint_interval=0)
    settings = replace(settings, model=replace(settings.model, **model), parallel=parallel)
    directory.mkdir(exist_ok=True)
    return KilledTrainer(resumed(settings) if resume else settings, Mesh.of(parallel, "cpu"), corpus(), directory)


def state(run: Trainer) -> Measured:
    """All weights and moments, whole; collective."""
    known, mesh = run.optimizer.placements, run.mesh
    return {
        name: gather_full(part, known[name.split("/", 1)[1]], mesh.tp, mesh.dp_shard).numpy()
        for name, part in run.optimizer.state().items()
    }


def begin(parallel: ParallelConfig, directory: Path, model: dict[str, Any]) -> Measured:
    """On a rank: two steps, and a checkpoint."""
    run = trainer(parallel, directory, resume=False, **model)
    _steps(run, 2)
    _save(run)
    return state(run)


def _save(run: Trainer) -> None:
    run.save()
    run.checkpoints.wait()


def _steps(run: KilledTrainer, count: int) -> None:
    run.last = count
    for _ in range(count):
        run._train_step()


def through(parallel: ParallelConfig, directory: Path, model: dict[str, Any]) -> tuple[Measured, Any]:
    """On a rank: load the checkpoint, and save it again as this layout does."""
    run = trainer(parallel, directory, resume=True, **model)
    assert run.step == 2
    _save(run)
    scaler = run.optimizer.scaler
    return state(run), (run.optimizer.steps, scaler and scaler.state())


def same(a: Measured, b: Measured) -> bool:
    """Bit for bit, of what a pipeline's stage has."""
    return a.keys() <= b.keys() and all(np.array_equal(a[name].view(np.uint8), b[name].view(np.uint8)) for name in a)


def contents(directory: Path) -> dict[str, bytes]:
    """The files of the checkpoint that do not say who wrote it."""
    path = directory / "checkpoints" / "step_00000002"
    files = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    assert files.keys() >= {*WROTE, "config.json", "model.safetensors", "optimizer/model.safetensors"}
    return {name: content for name, content in files.items() if name not in WROTE}


MODELS: dict[str, dict[str, Any]] = {  # odd vocabulary (257), and fewer KV heads than tp
    "llama, one KV head, tied": {"num_kv_heads": 1, "tie_embeddings": True},
    "gpt, tied": {"gpt": True},
}
LAYOUTS = {
    "tp 4": ParallelConfig(tp=4),
    "alone": ParallelConfig(),
    "pp 2 x tp 2": ParallelConfig(pp=2, tp=2, sequence_parallel=True),
    "hsdp": ParallelConfig(dp=4, dp_mode="hsdp", dp_shard=2),
    "fsdp x tp": SHARED,
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_through_every_layout_and_back_bit_for_bit(model: dict[str, Any], tmp_path: Path, ranks: Ranks) -> None:
    """fsdp x tp 2 -> tp 4 -> one process -> a pipeline -> hsdp -> fsdp x tp 2: the same state, and the same bytes."""
    expected = ranks(begin, 4, SHARED, tmp_path, model)[0]
    first = contents(tmp_path)
    numbers = sum(len(load_numbers(content)) for content in first.values() if content[:1] != b"{")
    assert numbers == 4 * sum(x.size for x in expected.values()), "each number once"
    for name, parallel in LAYOUTS.items():
        for found, progress in ranks(
            through, parallel.pp * parallel.tp * (parallel.dp or 1), parallel, tmp_path, model
        ):
            assert same(found, expected), name
            assert len(found) >= len(expected) // 3, name
            assert progress == (2, None), name
        assert contents(tmp_path) == first, name


def load_numbers(content: bytes) -> bytes:
    """A file of tensors without its header."""
    return content[8 + int.from_bytes(content[:8], "little") :]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_masters_and_the_loss_scale_as_well(precision: str, tmp_path: Path, ranks: Ranks) -> None:
    """What computes in 16 bits is saved in 32; the scale, and how long it has held, is that of the run."""
    first, then = (ParallelConfig(tp=tp, precision=precision) for tp in (2, 4))  # type: ignore[arg-type]
    expected = ranks(begin, 2, first, tmp_path, {})[0]
    assert all(x.dtype == np.float32 for x in expected.values())
    assert json.loads((tmp_path / "checkpoints/step_00000002/config.json").read_text())["dtype"] == "float32"
    before = contents(tmp_path)
    meta = json.loads((tmp_path / "checkpoints/step_00000002/meta.json").read_text())
    assert ("loss_scaler" in meta) == (precision == "fp16")
    for found, progress in ranks(through, 4, then, tmp_path, {}):
        assert same(found, expected)
        assert progress == (meta["updates"], meta.get("loss_scaler"))
    assert contents(tmp_path) == before


def logits_of(directory: Path, tokens: list[list[int]]) -> Any:
    """On a rank of two: of the weights of a checkpoint, opened by our own load_pretrained."""
    model = tpformer.load_pretrained(directory, mesh=Mesh.create(tp=2, device="cpu"))
    with torch.no_grad():
        return model.full_logits(torch.tensor(tokens)).numpy()


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_weights_are_a_hugging_face_directory(model: dict[str, Any], tmp_path: Path, ranks: Ranks) -> None:
    """transformers opens the checkpoint as it is, nothing missing or left over, and computes what we do."""
    from transformers import AutoModelForCausalLM

    ranks(begin, 2, ParallelConfig(tp=2), tmp_path, model)
    path = tmp_path / "checkpoints" / "step_00000002"
    theirs, about = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(about[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    tokens = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    for found in ranks(logits_of, 2, path, tokens):
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_model_that_no_family_has_is_saved_without_a_config(tmp_path: Path, ranks: Ranks) -> None:
    """Mistral's window with Qwen's norms, for one; it goes on at another layout all the same."""
    model = {"sliding_window": 3, "qk_norm": True, "out_bias": True}
    expected = ranks(begin, 2, ParallelConfig(tp=2), tmp_path, model)[0]
    path = tmp_path / "checkpoints" / "step_00000002"
    assert not (path / "config.json").exists()
    for found, _ in ranks(through, 1, ParallelConfig(), tmp_path, model):
        assert same(found, expected)


def evaluated(parallel: ParallelConfig, directory: Path, steps: int | None) -> None:
    """On a rank: six steps, evaluations and a sample; or as many steps, and then the rest in a second run."""
    if steps is not None:
        run = trainer(parallel, directory, resume=False)
        _steps(run, steps)
        _save(run)
        run = trainer(parallel, directory, resume=True)
    else:
        run = trainer(parallel, directory, resume=False)
    run.last = -1
    run.run()


@pytest.mark.parametrize("mode", ["fsdp", "zero2"])
def test_a_whole_run_is_that_of_one_process(mode: str, tmp_path: Path, ranks: Ranks) -> None:
    """Also evaluation, where one replica has a batch more than the other, and going on after two steps."""
    parallel = ParallelConfig(dp=2, dp_mode=mode)  # type: ignore[arg-type]
    ranks(evaluated, 1, ParallelConfig(), tmp_path / "alone", None)
    ranks(evaluated, 2, parallel, tmp_path / "shared", 2)
    alone, shared = (
        {(r["step"], k): v for r in records(tmp_path / d) for k, v in r.items()} for d in ("alone", "shared")
    )
    held_out = [key for key in shared if key[1] == "validation_loss"]
    assert len(held_out) == 2
    assert len(shared) > 8
    for key, value in shared.items():
        assert value == pytest.approx(alone[key], rel=1e-5), key
