"""`tpformer checkpoint inspect`: what is printed of a run's checkpoint and of anyone's directory, and its status."""

import re
from pathlib import Path

import pytest

from tests.checkpoint.cases import parts, save_tiny
from tests.checkpoint.directories import save_case
from tpformer import Mesh
from tpformer.__main__ import main
from tpformer.checkpoint.chunks import Part, chunks
from tpformer.checkpoint.inspect import size
from tpformer.checkpoint.store import META, save_checkpoint

ABOUT = {"samples": 3200, "data": {"seq_len": 256}, "layout": {"pp": 1, "dp": 2, "tp": 4}, "versions": {"torch": "9.9"}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model of two layers, with both moments."""
    documents = {META: ABOUT, "config.json": {"model_type": "llama"}}
    return save_checkpoint(tmp_path_factory.mktemp("run"), 400, chunks(parts("llama-kv1-tied", Mesh(), 1)), documents)


def test_it_says_who_wrote_it_and_what_it_holds(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "inspect", str(checkpoint)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(checkpoint)
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines[1 : lines.index("")])
    weights = sum(part.placement.shape[0] * (part.placement.shape[1:] or (1,))[0] for part in whole_weights())
    assert facts == {
        "model": "llama",
        "step": "400, 3,200 samples of 256 tokens",
        "written by": "pp 1, dp 2, tp 4",
        "versions": "torch 9.9",
        "parameters": f"{weights + 1:,}",  # and the scalar
        "weights": size(4 * (weights + 1)),
        "optimizer": size(8 * (weights + 1)),
    }
    assert lines[-1] == "every checksum is right"
    assert any(re.match(r"model\.layers\.0 to 1 +30 ", line) for line in lines)
    assert any(re.match(r"exp_avg_sq\.model\.layers\.0 to 1 +30 ", line) for line in lines)
    assert max(map(len, lines[1:])) < 100


def whole_weights() -> list[Part]:
    """The parts of the weights, but for the scalar."""
    return [p for p in parts("llama-kv1-tied", Mesh(), 1) if not p.folder and p.placement.shape]


def test_it_lists_every_tensor_with_its_shape(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "inspect", "--tensors", "--no-verify", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^model\.embed_tokens\.weight +101 x 32 +3,232 +F32 +12\.6 KiB$", out, re.MULTILINE)
    assert re.search(
        r"^exp_avg\.model\.layers\.1\.self_attn\.k_proj\.weight +8 x 32 +256 +F32 +1\.0 KiB$", out, re.MULTILINE
    )
    assert out.endswith("\nnot verified\n")


@pytest.mark.parametrize(
    ("damage", "options", "text"),
    [
        (
            lambda c: c[:-1] + bytes([c[-1] ^ 1]),
            [],
            r"model\.safetensors is damaged: the checksum of w\[0:64\] differs",
        ),
        (lambda c: c[:-1], ["--no-verify"], r"model\.safetensors is missing, damaged or truncated"),
    ],
    ids=["a number", "cut"],
)
def test_damage_is_named_and_the_status_is_1(
    damage: object, options: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_tiny(tmp_path, 1)
    file = path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    assert main(["checkpoint", "inspect", *options, str(path)]) == 1
    assert re.search(text, capsys.readouterr().err)


def test_without_verifying_another_number_is_not_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The control of the case above."""
    path = save_tiny(tmp_path, 1)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert main(["checkpoint", "inspect", "--no-verify", str(path)]) == 0


def test_a_hugging_face_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Written by transformers, in several files."""
    path = save_case("tied-gelu-tanh", tmp_path / "gpt2", max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    assert main(["checkpoint", "inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^model +gpt2$", out, re.MULTILINE)
    assert "step" not in out
    assert "optimizer" not in out
    assert re.search(r"^transformer\.h\.0 to 1 +24 ", out, re.MULTILINE)
    assert out.endswith("headers and sizes are whole; there are no checksums\n")


def test_nothing_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "inspect", str(tmp_path)]) == 1
    assert "holds no model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (128, "128 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB")])
def test_sizes_are_for_people(count: int, text: str) -> None:
    assert size(count) == text
