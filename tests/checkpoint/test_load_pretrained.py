"""Directories that transformers wrote, opened at any tp: its logits, its loss, its gradients."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import tpformer
from tests.checkpoint.directories import GPT2, edit_config, measure_directory, save_case
from tests.distributed import Ranks
from tests.models import test_transformers_gpt2, test_transformers_llama
from tests.proofs.cases import TOLERANCE, measure_model, mismatches
from tpformer import Mesh
from tpformer.checkpoint import reading
from tpformer.models.decoder import Part

LLAMAS = test_transformers_llama
RUNS = [(case, torch.float64) for case in (*GPT2, *LLAMAS.EXACT)]
RUNS += [(case, torch.float32) for case in LLAMAS.CASES if case not in LLAMAS.EXACT]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_logits_loss_and_gradients_are_transformers(
    case: str, dtype: torch.dtype, ranks: Ranks, tmp_path: Path
) -> None:
    family = test_transformers_gpt2 if case in GPT2 else LLAMAS
    expected, _ = family.reference(case, dtype)
    save_case(case, tmp_path)
    alone = [measure_model(tpformer.load_pretrained(tmp_path, dtype=dtype))]
    for results in [alone, *ranks(measure_directory, 4, tmp_path, (2, 4), dtype)]:
        for found in results:
            assert mismatches(expected, found, TOLERANCE[dtype]) == []


@pytest.mark.parametrize("case", ["untied-gelu-257", "qwen2-kv2-tied", "qwen3-kv1-257"])
def test_an_index_of_many_files_is_the_same(case: str, ranks: Ranks, tmp_path: Path) -> None:
    one = measure_model(tpformer.load_pretrained(save_case(case, tmp_path / "one")))
    save_case(case, tmp_path / "many", max_shard_size="12KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    for results in ranks(measure_directory, 2, tmp_path / "many", (1, 2), torch.float32):
        for found in results:
            assert mismatches(one, found, 1e-5) == []


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    """Some directories have both, and not of the same weights; transformers opens the single one."""
    case = "untied-gelu-257"
    save_case(case, tmp_path, max_shard_size="12KB")
    many = tpformer.full_parameter(tpformer.load_pretrained(tmp_path), "norm.weight").clone()
    torch.manual_seed(1)
    model = test_transformers_gpt2.oracle(case)
    with torch.no_grad():
        model.transformer.ln_f.weight.add_(1)
    model.save_pretrained(tmp_path / "single")
    (tmp_path / "single" / "model.safetensors").rename(tmp_path / "model.safetensors")
    found = tpformer.full_parameter(tpformer.load_pretrained(tmp_path), "norm.weight")
    assert torch.equal(found, type(model).from_pretrained(tmp_path).transformer.ln_f.weight)
    assert torch.equal(found, many + 1)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes_of_files_and_of_models(kind: torch.dtype, tmp_path: Path) -> None:
    model = LLAMAS.oracle("llama-kv2-tied", "eager").to(kind)
    model.save_pretrained(tmp_path)
    whole = model.model.embed_tokens.weight.detach()
    ours = tpformer.load_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {kind}
    assert torch.equal(tpformer.full_parameter(ours, "embedding.weight"), whole)
    for dtype in (torch.float32, torch.bfloat16):
        cast = tpformer.load_pretrained(tmp_path, dtype=dtype)
        assert torch.equal(tpformer.full_parameter(cast, "embedding.weight"), whole.to(dtype))


def test_older_config_files(tmp_path: Path) -> None:
    """rope_theta and rope_scaling instead of rope_parameters, and torch_dtype."""
    new = tpformer.load_pretrained(save_case("llama-kv2-llama3", tmp_path))
    rope = dict(LLAMAS.LLAMA3)
    rope["type"] = rope.pop("rope_type")
    edit_config(tmp_path, rope_parameters=None, rope_theta=100.0, rope_scaling=rope, torch_dtype="float32", dtype=None)
    old = tpformer.load_pretrained(tmp_path)
    assert old.config == new.config
    assert old.config.rope_scaling.kind == "llama3"


def asked_for(path: Path, tp: int, pp: int = 1) -> tuple[int, int, int]:
    """On a rank: bytes that opening it asked the files for, of the model's own, and of the largest tensor."""
    asked = []
    real = reading.Source.read

    def read(self: Any, box: Any) -> torch.Tensor:
        part = real(self, box)
        asked.append(part.numel() * part.element_size())
        return part

    reading.Source.read = read  # type: ignore[method-assign]
    try:
        model = tpformer.load_pretrained(path, mesh=Mesh.create(tp=tp, pp=pp, device="cpu"))
    finally:
        reading.Source.read = real  # type: ignore[method-assign]
    known = tpformer.placements(model, model.mesh)
    held = sum(p.detach()[ours].nbytes for name, p in model.named_parameters() for _, _, ours in known[name].slices())
    return sum(asked), held, max(asked)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("case", ["untied-gelu-257", "qwen3-kv1-257", "qwen2-kv2-tied"])
def test_a_rank_reads_its_slices_and_no_other_byte(case: str, tp: int, pp: int, ranks: Ranks, tmp_path: Path) -> None:
    save_case(case, tmp_path)
    total = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    results = ranks(asked_for, tp * pp, tmp_path, tp, pp)
    for asked, held, largest in results:
        assert asked == held  # each byte of its part once
        assert largest < total / 3
    if tp * pp > 1:
        assert all(asked < 0.75 * total for asked, _, _ in results)


def pipeline_logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    """On one of two ranks of a pipeline: its blocks' outputs, from the first stage by hand to the last."""
    mesh = Mesh.create(pp=2, device="cpu")
    part = Part((0,), True, False) if mesh.pp.rank == 0 else Part((1,), False, True)
    model = tpformer.load_pretrained(path, mesh=mesh, part=part)
    whole = tpformer.load_pretrained(path)
    with torch.no_grad():
        if mesh.pp.rank == 0:
            return model.run_blocks(model.embed(tokens)) - whole.run_blocks(whole.embed(tokens), [0])
        x = whole.run_blocks(whole.embed(tokens), [0])
        return model.to_logits(model.norm(model.run_blocks(x)))[..., : whole.config.vocab_size] - whole.full_logits(
            tokens
        )


@pytest.mark.parametrize("case", ["tied-gelu-tanh", "qwen3-kv1-257"])
def test_stages_of_a_pipeline(case: str, ranks: Ranks, tmp_path: Path) -> None:
    save_case(case, tmp_path)
    tokens = torch.randint(101, (2, 8), generator=torch.Generator().manual_seed(0))
    assert all(not difference.any() for difference in ranks(pipeline_logits, 2, tmp_path, tokens))


def anonymous_peak(path: Path, tp: int) -> tuple[int, int, int]:
    """On a rank: how much memory of its own opening takes at most, its part's bytes, and the largest read's."""
    from tpformer.checkpoint.huggingface import Pretrained

    mesh, peak = Mesh.create(tp=tp, device="cpu"), 0
    tpformer.load_pretrained(path, mesh=mesh)  # whatever a first time allocates for good
    real, before = Pretrained.fill, _anonymous()
    largest = 0

    def seen(read: Any) -> Any:
        def call(self: Any, box: Any) -> torch.Tensor:
            nonlocal peak, largest
            part = read(self, box)
            peak, largest = max(peak, _anonymous() - before), max(largest, part.nbytes)
            return part

        return call

    read = reading.Source.read
    reading.Source.read = seen(read)  # type: ignore[method-assign]
    try:
        model = tpformer.load_pretrained(path, mesh=mesh)
    finally:
        reading.Source.read, Pretrained.fill = read, real  # type: ignore[method-assign]
    return peak, sum(p.nbytes for p in model.parameters()), largest


def _anonymous() -> int:
    """This process's own memory in bytes, without what it has mapped of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_opening_peaks_at_the_shard_and_one_tensor(ranks: Ranks, tmp_path: Path) -> None:
    """48 MB a rank, so that what Python allocates by the way is small beside it."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    for peak, shard, largest in ranks(anonymous_peak, 2, tmp_path, 2):
        assert shard > 40e6
        assert peak < 1.05 * (shard + largest)
