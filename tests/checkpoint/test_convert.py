"""tpformer checkpoint convert: from checkpoints to Hugging Face directories and back, file by file."""

import json
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tpformer
from tests.checkpoint.directories import save_case
from tpformer.__main__ import main
from tpformer.checkpoint import reading
from tpformer.checkpoint.boxes import Box
from tpformer.checkpoint.reading import SINGLE
from tpformer.checkpoint.store import verify


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama of transformers', with a tokenizer beside it."""
    directory = save_case("llama-kv2-tied", tmp_path_factory.mktemp("source") / "model")
    (directory / "tokenizer.json").write_text("{}")
    return directory


def convert(*arguments: object) -> int:
    return main(["checkpoint", "convert", *map(str, arguments)])


def test_there_and_back(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(source, tmp_path / "checkpoints") == 0
    step = tmp_path / "checkpoints" / "step_00000000"
    assert f"{step}, a checkpoint" in capsys.readouterr().out
    assert verify(step)["model"]["num_layers"] == 2
    assert main(["checkpoint", "inspect", str(step)]) == 0
    assert "every checksum is right" in capsys.readouterr().out
    assert convert(step, tmp_path / "out") == 0
    assert f"{tmp_path / 'out'}, a Hugging Face directory" in capsys.readouterr().out
    before, after = load_file(source / SINGLE), load_file(tmp_path / "out" / SINGLE)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], x) for name, x in after.items())
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "meta.json").exists()
    for directory in (step, tmp_path / "out"):
        transformers.AutoModelForCausalLM.from_pretrained(directory)


def test_a_checkpoint_is_never_replaced(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(source, tmp_path / "checkpoints") == 0
    step = tmp_path / "checkpoints" / "step_00000000"
    before = {path: path.read_bytes() for path in step.iterdir()}
    capsys.readouterr()
    assert convert(source, tmp_path / "checkpoints") == 1
    assert f"{step} is a checkpoint already" in capsys.readouterr().err
    for origin in (step, source):
        assert convert(origin, step, "--to", "huggingface", "--dtype", "bfloat16", "--overwrite") == 1
        assert f"{step} is a run's checkpoint" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in step.iterdir()} == before


def test_another_dtype(source: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "half", "--to", "huggingface", "--dtype", "bfloat16") == 0
    before, after = load_file(source / SINGLE), load_file(tmp_path / "half" / SINGLE)
    assert all(torch.equal(before[name].bfloat16(), x) for name, x in after.items())
    assert convert(tmp_path / "half", tmp_path / "checkpoints") == 0
    wide = load_file(tmp_path / "checkpoints" / "step_00000000" / SINGLE)
    assert all(torch.equal(wide[name], x.float()) for name, x in after.items())


def test_a_tied_head_that_is_a_copy_is_left_out(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    tensors = load_file(source / SINGLE)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, copy / SINGLE)
    (copy / "config.json").write_bytes((source / "config.json").read_bytes())
    assert convert(copy, tmp_path / "checkpoints") == 0
    assert load_file(tmp_path / "checkpoints" / "step_00000000" / SINGLE).keys() == tensors.keys()
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, copy / SINGLE)
    assert convert(copy, tmp_path / "more") == 1
    assert not (tmp_path / "more").exists()


def test_the_checkpoints_of_a_run_are_neither_replaced_nor_added_to(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run would go on with its latest one, as if nothing had been converted."""
    assert convert(source, tmp_path) == 0
    (tmp_path / "step_00000000").rename(tmp_path / "step_00000400")
    assert convert(source, tmp_path) == 1
    assert "step_00000400 is a checkpoint already" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000400"]


def test_one_tensor_at_a_time(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    most = 0
    real = reading.Source.read

    def read(self: reading.Source, box: Box) -> torch.Tensor:
        nonlocal most
        part = real(self, box)
        number = part.data_ptr()
        alive.append(number)
        weakref.finalize(part, alive.remove, number)
        most = max(most, len(alive))
        return part

    monkeypatch.setattr(reading.Source, "read", read)
    assert convert(source, tmp_path / "out", "--to", "huggingface") == 0
    assert 1 <= most <= 2


@pytest.mark.parametrize("damage", ["cut", "flip", "no config", "in the way", "dtype"])
def test_what_is_wrong_is_one_line(
    damage: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(source, tmp_path / "checkpoints")
    step = tmp_path / "checkpoints" / "step_00000000"
    file = step / SINGLE
    arguments: list[object] = [step, tmp_path / "out"]
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:-5])
    elif damage == "flip":
        content[-5] ^= 1
        file.write_bytes(content)
    elif damage == "no config":
        (source.parent / "empty").mkdir(exist_ok=True)
        arguments[0] = source.parent / "empty"
    elif damage == "in the way":
        arguments[1] = source
    else:
        arguments = [source, tmp_path / "out", "--dtype", "float16"]
    capsys.readouterr()
    assert convert(*arguments) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("tpformer checkpoint")]
    word = {"cut": "truncated", "flip": "checksum", "no config": "config.json", "in the way": "not empty"}
    assert word.get(damage, "--dtype") in line
    assert not (tmp_path / "out").exists()


def test_a_run_s_checkpoint_is_a_hugging_face_directory(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "checkpoints")
    step = tmp_path / "checkpoints" / "step_00000000"
    ours, theirs = tpformer.load_pretrained(step), tpformer.load_pretrained(source)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert json.loads((step / "config.json").read_text())["dtype"] == "float32"
