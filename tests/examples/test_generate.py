"""examples/generate.py continues prompts, the same at any tp; examples/finetune_from_hf.py goes there and back."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from examples import finetune_from_hf, generate
from tests.distributed import Ranks
from tests.examples.launch import text_files

MAINS = {"generate": generate.main, "finetune": finetune_from_hf.main}


def run(name: str, arguments: list[str]) -> tuple[int, str, str]:
    """On a rank: an example's exit code, and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = MAINS[name](arguments)
    return code, out.getvalue(), err.getvalue()


def save(model: Any, directory: Path) -> Path:
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tokenizer of its own, which begins a text by a mark."""
    directory = tmp_path_factory.mktemp("llama")
    text = text_files(directory)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train(
        [str(path) for path in text.iterdir()], trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"])
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size() + 3,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    save(transformers.LlamaForCausalLM(config), directory / "model")
    tokenizer.save(str(directory / "model" / "tokenizer.json"))
    return directory


def test_the_same_text_at_any_tp(llama: Path, ranks: Ranks) -> None:
    arguments = [str(llama / "model"), "def f1(x)", "--max-new-tokens", "12", "--device", "cpu"]
    code, alone, err = run("generate", arguments)
    assert (code, err) == (0, "")
    assert alone.startswith("def f1(x)")
    assert len(alone) > len("def f1(x)") + 5
    for results in (ranks(run, 2, "generate", arguments), ranks(run, 4, "generate", arguments)):
        assert [out for _, out, _ in results] == [alone, *[""] * (len(results) - 1)]


def test_it_is_what_transformers_would_say(llama: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama / "model")
    ids = Tokenizer.from_file(str(llama / "model" / "tokenizer.json")).encode("def f2").ids
    assert ids[0] == 1, "the mark"
    with torch.no_grad():
        theirs = model.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False)[0].tolist()
    tokenizer = Tokenizer.from_file(str(llama / "model" / "tokenizer.json"))
    arguments = [str(llama / "model"), "def f2", "--max-new-tokens", "9", "--temperature", "0", "--device", "cpu"]
    _, out, _ = run("generate", arguments)
    known = [token for token in theirs[len(ids) :] if token < tokenizer.get_vocab_size()]
    assert out == "def f2" + tokenizer.decode(known) + "\n"


def test_several_prompts_are_each_what_they_are_alone(llama: Path) -> None:
    options = ["--max-new-tokens", "6", "--temperature", "0", "--device", "cpu"]
    code, out, err = run("generate", [str(llama / "model"), "def f2", "return x + 7 def", *options])
    alone = [run("generate", [str(llama / "model"), text, *options])[1] for text in ("def f2", "return x + 7 def")]
    assert code == 0
    assert out == "".join(f"\n{each}" for each in alone)
    assert "6/6" in err, "the progress bar"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "100"], "max_seq_len (64)"),
        (["--top-p", "2"], "top_p (2.0)"),
        (["--temperature", "-1"], "temperature (-1.0)"),
    ],
)
def test_what_is_wrong_is_one_line(options: list[str], message: str, llama: Path, ranks: Ranks) -> None:
    arguments = [str(llama / "model"), "def", "--device", "cpu", *options]
    results = ranks(run, 2, "generate", arguments)
    assert [code for code, _, _ in results] == [2, 2]
    assert [out for _, out, _ in results] == ["", ""], "not even the prompt"
    assert results[1][2] == ""
    (line,) = results[0][2].splitlines()
    assert line.startswith("generate.py: error: ")
    assert message in line


def test_a_prompt_without_tokens_is_named() -> None:
    with pytest.raises(ValueError, match="prompt 2 of 3 has no token"):
        generate.batch([[1, 2], [], [3]], torch.device("cpu"))


def test_no_such_directory(tmp_path: Path) -> None:
    code, _, err = run("generate", [str(tmp_path / "nowhere"), "def", "--device", "cpu"])
    assert code == 2
    assert "config.json is missing" in err


def tune(llama: Path, output: Path, steps: int, lr: float) -> list[str]:
    sizes = ["--steps", str(steps), "--lr", str(lr), "--batch-size", "4", "--seq-len", "16", "--device", "cpu"]
    return [str(llama / "model"), str(output), "--data", str(llama / "text"), *sizes, "--prompt", "def f"]


def test_finetuning_goes_there_and_back(llama: Path, ranks: Ranks, tmp_path: Path) -> None:
    """At tp 2 and alone: the same weights, in a directory that transformers opens, with the tokenizer."""
    outputs = {}
    for tp in (1, 2):
        directory = tmp_path / f"tp{tp}"
        results = ranks(run, tp, "finetune", tune(llama, directory, 2, 1e-3))
        assert [code for code, _, _ in results] == [0] * tp, results[0][2]
        assert "2/2" in results[0][2], "the progress bar"
        assert "opened by transformers" in results[0][1]
        assert all(out == "" for _, out, _ in results[1:])
        outputs[tp] = load_file(directory / "model.safetensors")
        assert (directory / "tokenizer.json").read_bytes() == (llama / "model" / "tokenizer.json").read_bytes()
        assert json.loads((directory / "config.json").read_text())["eos_token_id"] == 2, "as in the model's"
    before = load_file(llama / "model" / "model.safetensors")
    for name, one in outputs[1].items():
        assert (one - outputs[2][name]).abs().max() < 1e-5 * one.abs().max()
        assert not torch.equal(one, before[name])


def test_finetuning_refuses_before_it_trains(llama: Path, ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    results = ranks(run, 2, "finetune", tune(llama, tmp_path, 2, 1e-3))
    assert [code for code, _, _ in results] == [2, 2]
    assert results[0][2] == f"finetune_from_hf.py: error: {tmp_path} is not empty: give another\n", "no progress bar"


def test_finetuning_learns(llama: Path, ranks: Ranks, tmp_path: Path) -> None:
    ranks(run, 2, "finetune", tune(llama, tmp_path / "out", 6, 1e-2))
    first, last = (loss(directory, llama) for directory in (llama / "model", tmp_path / "out"))
    assert last < first - 0.5


def test_what_bf16_learns_is_written_in_fp32(llama: Path, ranks: Ranks, tmp_path: Path) -> None:
    """A rate so small that bf16 rounds each of its updates away."""
    ranks(run, 2, "finetune", [*tune(llama, tmp_path / "out", 2, 1e-7), "--bf16"])
    before, after = (load_file(d / "model.safetensors") for d in (llama / "model", tmp_path / "out"))
    assert all(x.dtype == torch.float32 for x in after.values())
    moved = {name: (after[name] - x).abs().max() for name, x in before.items()}
    assert all(0 < distance < 1e-6 for distance in moved.values())


def loss(directory: Path, llama: Path) -> float:
    """transformers' own, of some of the text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode((llama / "text" / "0.py").read_text()).ids
    tokens = torch.tensor([ids[:60]])
    return model(tokens, labels=tokens).loss.item()


def test_an_output_in_the_way_is_said_before_training(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, _, err = run("finetune", tune(llama, tmp_path, 2, 1e-3))
    assert code == 2
    assert f"{tmp_path} is not empty" in err
    assert "0/2" not in err


def test_finetuning_says_what_is_wrong(llama: Path, tmp_path: Path) -> None:
    long = [str(llama / "model"), str(tmp_path / "out"), "--seq-len", "65", "--device", "cpu"]
    assert "--seq-len (65) must be at most the model's max_seq_len (64)" in run("finetune", long)[2]
    code, _, err = run("finetune", [str(tmp_path), str(tmp_path / "out"), "--device", "cpu"])
    assert code == 2
    assert "finetune_from_hf.py: error: " in err
    assert not (tmp_path / "out").exists()
