"""examples/pretrain.py trains on every kind of data, family and layout, says what it did, and goes on with --resume."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from tests.distributed import Ranks
from tests.examples.launch import OF_LLAMA, SMALL, Ended, launch, pretrain, text_files, token_ids
from tpformer.data import write_indexed

STEPS = ["--steps", "3", "--checkpoint-interval", "2"]
TP2 = ["--tp", "2"]


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, but for what saving took."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if "checkpoint_step" not in record]


def number(name: str, out: str) -> float:
    """The number after a name in the closing lines."""
    match = re.search(rf"^{re.escape(name)} +(-?[0-9.]+)", out, re.MULTILINE)
    assert match, f"no {name} in {out}"
    return float(match[1])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with text in it."""
    directory = tmp_path_factory.mktemp("place")
    text_files(directory)
    return directory


@pytest.fixture(scope="module")
def launched(place: Path) -> Ended:
    """The run `first` at tp 2 under torchrun."""
    arguments = [*TP2, *SMALL, *OF_LLAMA, *STEPS, "--data", "text", "--name", "first", "--prompt", "def f"]
    return launch(arguments, place).end()


def test_torchrun_ends_well_and_leaves_no_process(launched: Ended) -> None:
    assert launched.code == 0, launched.err
    assert launched.left == []
    assert "Traceback" not in launched.err
    assert "Warning" not in launched.err
    assert "3/3" in launched.err, "the progress bar"
    assert "tok/s=" in launched.err


def test_it_prints_the_collectives_the_losses_and_a_sample(launched: Ended, place: Path) -> None:
    """Once, by one rank. The table's rows are of one layer at tp 2; the loss is near ln(257) after three steps."""
    out = launched.out
    assert (
        out.count("tp 2 x pp 1 x dp 1 on cpu, fp32") == out.count("held-out loss") == out.count("ln(vocabulary)") == 1
    )
    table = re.findall(r"^(all_\w+) +(\w+) +(forward|backward) +(\w+) +(\d+) +([\d,]+) +(\S+):\d+$", out, re.MULTILINE)
    activation = 4 * 16 * 32 * 4  # batch, length, width, bytes of a number
    assert [
        (op, axis, phase, kind, int(n), int(size.replace(",", ""))) for op, axis, phase, kind, n, size, _ in table
    ] == [
        ("all_reduce", "tp", "forward", "float32", 1, activation),  # embedding
        ("all_reduce", "tp", "forward", "float32", 2, 2 * activation),  # attention and MLP
        ("all_gather", "tp", "forward", "float32", 1, 2 * 3 * 4 * 16 * 4),  # loss
        ("all_reduce", "tp", "backward", "float32", 1, activation),  # head
        ("all_reduce", "tp", "backward", "float32", 2, 2 * activation),  # attention and MLP
        ("all_reduce", "tp", "forward", "float64", 1, 24),  # norm, loss, whether to stop
    ]
    assert number("ln(vocabulary)", out) == 5.5491
    assert abs(number("held-out loss", out) - 5.5491) < 0.5
    assert 2 < number("unigram entropy", out) < 4
    sample = re.search(r"a sample\n-+\n(.*)\n-+\n", out, re.DOTALL)
    assert sample
    assert sample[1].startswith("def f")
    assert len(sample[1]) > len("def f")
    assert out.rstrip().endswith("runs/first/  config.toml  metrics.jsonl  loss.png  checkpoints/")


def test_it_writes_the_run(launched: Ended, place: Path) -> None:
    assert launched.code == 0
    run = place / "runs" / "first"
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.toml", "loss.png", "metrics.jsonl"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_00000002", "step_00000003"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    config = tomllib.loads((run / "config.toml").read_text())
    assert (config["parallel"]["tp"], config["run"]["steps"], config["model"]["hidden_size"]) == (2, 3, 32)
    assert (config["run"]["name"], config["run"]["resume"]) == ("first", False)
    found = records(run)
    assert [r["step"] for r in found] == [1, 2, 3, 3]
    assert all(r["loss"] > 0 and r["grad_norm"] > 0 and r["tokens_per_second"] > 0 for r in found[:3])
    assert f"{found[3]['validation_loss']:.4f}" == f"{number('held-out loss', launched.out):.4f}"


def test_resume_goes_on_from_the_last_checkpoint(launched: Ended, place: Path, ranks: Ranks) -> None:
    """With nothing said but --resume and more steps: the rest is the run's own configuration.

    (Under torchrun a killed run is resumed, in test_killed.)
    """
    assert launched.code == 0
    before = records(place / "runs" / "first")
    (code, out, err), *others = ranks(pretrain, 2, ["--resume", "--steps", "5"], place)
    assert code == 0, err
    assert others == [(0, "", "")]
    assert "resumed at step 3" in out
    found = records(place / "runs" / "first")
    assert found[:4] == before
    assert [r["step"] for r in found] == [1, 2, 3, 3, 4, 5, 5]
    assert tomllib.loads((place / "runs" / "first" / "config.toml").read_text())["run"]["steps"] == 5


def train(ranks: Ranks, processes: int, place: Path, name: str, arguments: list[str]) -> tuple[str, list[Any]]:
    """What a run of main() printed on the first rank, and its records; the other ranks must say nothing."""
    flags = [*SMALL, *STEPS, *arguments, "--name", name]
    (code, out, err), *others = ranks(pretrain, processes, flags, place)
    assert code == 0, err
    assert all((code, out, err) == (0, "", "") for code, out, err in others)
    found = records(place / "runs" / name)
    assert [r["step"] for r in found] == [1, 2, 3, 3]
    return out, found


def losses(found: list[dict[str, Any]]) -> list[float]:
    """All losses, in order."""
    return [r["loss"] if "loss" in r else r["validation_loss"] for r in found]


LAYOUTS = {
    "tp1": (1, []),
    "tp2-dp2": (4, TP2),
    "tp2-sequence-parallel": (2, [*TP2, "--sequence-parallel"]),
    "tp2-dp2-sequence-parallel": (4, [*TP2, "--dp", "2", "--sequence-parallel"]),
    "dp2": (2, []),
}


@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_the_losses_do_not_depend_on_the_layout(family: str, place: Path, ranks: Ranks) -> None:
    """With dropout, in micro-batches; and the sample is the same text."""
    flags = ["--data", "text", "--family", family, "--dropout", "0.1", "--micro-batch-size", "2"]
    flags += OF_LLAMA if family == "llama" else []
    found = {
        name: train(ranks, processes, place, f"{family}-{name}", [*flags, *layout])
        for name, (processes, layout) in LAYOUTS.items()
    }
    out, expected = found["tp1"]
    assert "tp 1 x pp 1 x dp 1 on cpu, fp32" in out
    assert "tp 2 x pp 1 x dp 2 on cpu, fp32, sequence parallel, replicate" in found["tp2-dp2-sequence-parallel"][0]
    for name, (said, records) in found.items():
        assert losses(records) == pytest.approx(losses(expected), rel=1e-6), name
        assert said.split("a sample\n")[1][:100] == out.split("a sample\n")[1][:100]


def test_jsonl_and_a_tokenizer_of_one_s_own(place: Path, ranks: Ranks) -> None:
    documents = [f"the {a} of {b}" for a in ("cat", "dog", "hen") for b in ("york", "kent", "bath")] * 30
    (place / "d.jsonl").write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in documents))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        documents, tokenizers.trainers.WordLevelTrainer(special_tokens=["?", "<|endoftext|>"])
    )
    tokenizer.save(str(place / "tokenizer.json"))
    flags = [*TP2, *OF_LLAMA, "--data", "d.jsonl", "--tokenizer", "tokenizer.json", "--prompt", "the cat"]
    out, found = train(ranks, 2, place, "jsonl", flags)
    assert "vocabulary 10" in out  # the, of, three and three words, unknown and the end
    assert number("ln(vocabulary)", out) == 2.3026
    assert "the cat" in out.split("a sample")[1]
    assert losses(found)[0] == pytest.approx(2.3, abs=0.1)


def test_token_files_of_megatron_and_nanogpt_are_the_same_tokens(place: Path, ranks: Ranks) -> None:
    """Named in each way that there is; there is no tokenizer, and so no sample."""
    ids = token_ids(1500, 90)
    write_indexed(place / "pair", [ids[:700], ids[700:]], 90)
    ids.tofile(place / "nano.bin")
    found = {}
    for data in ("pair", "pair.bin", "pair.idx", "nano.bin"):
        flags = [*TP2, *OF_LLAMA, "--data", data, "--vocab-size", "90"]
        out, found[data] = train(ranks, 2, place, f"tokens-{data}", flags)
        assert "vocabulary 90" in out
        assert "1,425 tokens to train on, 75 held out" in out
        assert "a sample" not in out
    assert len({tuple(losses(records)) for records in found.values()}) == 1


def test_settings_come_from_a_file(place: Path, ranks: Ranks) -> None:
    """The TOML of one run makes another, with a flag on top."""
    flags = [*TP2, *OF_LLAMA, "--data", "text", "--lr", "0.01"]
    _, first = train(ranks, 2, place, "by-flags", flags)
    (code, *_), _ = ranks(pretrain, 2, ["--config", "runs/by-flags/config.toml", "--name", "by-file"], place)
    assert code == 0
    assert losses(records(place / "runs" / "by-file")) == losses(first)
    ranks(pretrain, 2, ["--config", "runs/by-flags/config.toml", "--name", "other", "--seed", "1"], place)
    assert losses(records(place / "runs" / "other")) != losses(first)


def test_without_a_name_it_is_the_date_and_time(place: Path, ranks: Ranks) -> None:
    flags = [*SMALL, *OF_LLAMA, *TP2, "--steps", "1", "--data", "text", "--runs-dir", "elsewhere"]
    assert [code for code, *_ in ranks(pretrain, 2, flags, place)] == [0, 0]
    (run,) = (place / "elsewhere").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}", run.name)
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.toml", "loss.png", "metrics.jsonl"]
