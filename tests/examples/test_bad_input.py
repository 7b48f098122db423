"""Wrong input ends every rank with one message and a code that is not 0, in seconds, and leaves no process.

Each wrong input goes through main() on two ranks; one that stops at each place of it is then launched under torchrun,
where a rank that went on alone would hang, and where every rank's words and code are seen as a person sees them.
"""

import json
import os
import re
import resource
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import Ranks
from tests.examples.launch import OF_LLAMA, SMALL, launch, messages, pretrain, text_files, token_ids
from tpformer.data import write_indexed

GOOD = [*SMALL, *OF_LLAMA, "--steps", "2", "--data", "text", "--name", "new"]
TP2 = ["--tp", "2"]

# what is added to a good command line, and what the one message must say
WRONG: dict[str, tuple[str, str]] = {
    # data
    "no such file": ("--data nowhere.txt", r"no file or directory 'nowhere\.txt'"),
    "no file of a glob": ("--data none*.txt", r"no readable text file in the glob 'none\*\.txt'"),
    "an empty file": ("--data empty.txt", r"no text in empty\.txt: every document is empty"),
    "an empty directory": ("--data nothing", r"no readable text file in the directory 'nothing'"),
    "too little text": ("--data short.txt", r"short\.txt has \d+ tokens, too few for a sample of seq_len \(16\)"),
    "a binary file": ("--data nano.txt", r"no readable text file in the file 'nano\.txt'"),
    "a wrong line of .jsonl": ("--data wrong.jsonl", r'wrong\.jsonl, line 2 has no string under "text"'),
    "ids over the vocabulary": ("--data nano.bin --vocab-size 60", r"nano\.bin holds id 89 at position \d+, .* 60 ids"),
    "ids of a pair over it": ("--data pair --vocab-size 60", r"pair holds id 89 at position \d+, .* 60 ids"),
    "ids without a vocabulary": ("--data nano.bin", r"nano\.bin holds token ids: say how many .* --vocab-size"),
    "half a token": ("--data odd.bin --vocab-size 90", r"odd\.bin is 2999 bytes, expected a positive multiple of 2"),
    "a .bin cut short": ("--data cutbin --vocab-size 90", r"cutbin\.bin is 2000 bytes, but cutbin\.idx promises 3000"),
    "an .idx cut short": ("--data cutidx --vocab-size 90", r"cutidx\.idx is 40 bytes, but its 2 sequences"),
    "an .idx cut in its header": ("--data cuthead --vocab-size 90", r"cuthead\.idx is 20 bytes, but the header alone"),
    "an .idx alone": ("--data alone.idx --vocab-size 90", r"no file alone\.bin"),
    "no .bin": ("--data gone.bin --vocab-size 90", r"no tokens at gone\.bin"),
    "too few ids": ("--data few.bin --vocab-size 90", r"few\.bin has 20 tokens, too few"),
    "all held out": ("--validation-part 1", r"validation_part \(1\.0\) must be above 0 and below 1"),
    "long samples": ("--seq-len 2000", r"the held-out part of text has \d+ tokens, fewer than one sample of seq_len"),
    # tokenizer
    "no tokenizer": ("--tokenizer none.json", r"no tokenizer file 'none\.json'"),
    "not a tokenizer": ("--tokenizer wrong.jsonl", r"wrong\.jsonl is not a Hugging Face tokenizer\.json"),
    "fewer ids than tokens": ("--vocab-size 100", r"vocab_size \(100\) must be at least 257, the tokens of byte"),
    # sizes
    "heads by tp": (
        "--num-heads 3 --num-kv-heads 3 --hidden-size 36",
        r"num_heads \(3\) must be divisible by tp \(2\)",
    ),
    "KV heads by tp": ("--num-heads 6 --num-kv-heads 3", r"num_kv_heads \(3\) must be divisible by tp \(2\)"),
    "heads by KV heads": ("--num-kv-heads 3", r"num_heads \(4\) must be divisible by num_kv_heads \(3\)"),
    "width of a head": ("--head-dim 7", r"head_dim \(7\) must be even"),
    "ffn by tp": ("--ffn-hidden-size 33", r"ffn_hidden_size \(33\) must be divisible by tp \(2\)"),
    "sequence by tp": ("--seq-len 17 --sequence-parallel", r"seq_len \(17\) must be divisible by tp \(2\)"),
    "sequence by positions": ("--max-seq-len 8", r"seq_len \(16\) must be at most max_seq_len \(8\)"),
    "batch by dp": ("--tp 1 --batch-size 3", r"batch_size \(3\) must be divisible by dp \(2\)"),
    "an activation": ("--activation relu", r"activation \('relu'\) must be one of silu, gelu, gelu_tanh"),
    "a rope scaling": ("--rope-scaling.factor 0.5", r"rope scaling factor \(0\.5\) must be at least 1"),
    "dropout": ("--dropout 1", r"dropout \(1\.0\) must be at least 0 and below 1"),
    # processes
    "tp of three": (
        "--tp 3",
        r"tp \(3\) x pp \(1\) x dp \(1\) needs 3 processes, but 2 are running: .* --nproc-per-node 3",
    ),
    "tp by dp": ("--dp 2", r"tp \(2\) x pp \(1\) x dp \(2\) needs 4 processes, but 2 are running"),
    "tp of none": ("--tp 0", r"tp \(0\) must be at least 1"),
    "more stages than layers": (
        "--tp 1 --pp 2",
        r"num_layers \(1\) must be at least the number of pipeline stages \(2\)",
    ),
    "too few micro-batches": (
        "--tp 1 --pp 2 --num-layers 2",
        r"pp_schedule \(1f1b\) on pp \(2\) needs at least 2 micro-b",
    ),
    "a batch that cannot be cut": (
        "--tp 1 --pp 2 --num-layers 2 --batch-size 4 --micro-batch-size 3",
        r"batch_size / dp \(4\) must be divisible by micro_batch_size \(3\)",
    ),
    "a compiled zero bubble": (
        "--tp 1 --pp 2 --num-layers 4 --pp-schedule zbv --compile",
        r"compile cannot be used with pp_schedule \(zbv\)",
    ),
    "an unknown module": (
        "--recompute selective --recompute-modules mpl",
        r"recompute_modules \(mpl\) must be among a block's: attention_norm, ",
    ),
    "no CUDA to take a snapshot of": ("--memory-snapshot", r"memory_snapshot needs a CUDA device, not cpu"),
    "groups that do not fit": (
        "--tp 1 --dp-mode hsdp --dp-shard 3",
        r"dp \(2\) must be divisible by dp_shard \(3\)",
    ),
    "a list of layers": (
        "--tp 1 --pp 2 --num-layers 2 --layers-per-stage 1 2",
        r"layers_per_stage \(1, 2\) adds up to 3, but num_layers is 2",
    ),
    "a group of another mode": ("--tp 1 --dp-mode fsdp --dp-shard 2", r"dp_shard \(2\) is for dp_mode hsdp"),
    "a timeline of no step": ("--timeline", r"timeline is of a run's third step: steps \(2\) must be at least 3"),
    # flags and TOML
    "an unknown flag": ("--stepz 2", r"Unrecognized options: --stepz"),
    "no number": ("--lr fast", r"Error parsing --lr: could not convert string to float: 'fast'"),
    "no value": ("--steps 2 --name", r"Missing value for argument '--name'"),
    "no such choice": ("--precision fp8", r"invalid choice 'fp8' for argument '--precision'"),
    "out of range": ("--steps 0", r"steps \(0\) must be at least 1"),
    "an unknown key": ("--config unknown.toml", r"unknown key 'run\.stepz' in the configuration"),
    "a wrong type": ("--config type.toml", r"run\.steps \('two'\) must be of type int"),
    "not TOML": ("--config short.txt", r"short\.txt cannot be read as TOML"),
    "no TOML": ("--config none.toml", r"none\.toml cannot be read as TOML: .*No such file"),
    "no such family": ("--config family.toml", r"family \('bert'\) must be llama or gpt"),
    # the run's directory
    "a name that is taken": ("--name taken", r"runs/taken holds a run already: go on with --resume"),
    "nothing to resume": ("--resume --name none", r"nothing to resume: no runs/none/config\.toml"),
    "nowhere to resume": ("--resume --runs-dir none", r"nothing to resume: no none/new/config\.toml"),
    "another batch": (
        "--resume --name taken --batch-size 8",
        r"step_00000001 was made with batch_size 4, not 8: the order of the data would change",
    ),
    "another model": ("--resume --name taken --num-layers 2", r"was made with another model: num_layers 1, not 2"),
    "a damaged checkpoint": ("--resume --name damaged", r"model\.safetensors is truncated: 1000 of "),
    "no file in it": ("--name blocked", r"Is a directory: 'runs/blocked/\.config\.toml\.partial'"),
    "no directory": ("--runs-dir short.txt", r"Not a directory: 'short\.txt/new'|File exists: 'short\.txt'"),
}


@pytest.fixture(scope="module")
def place(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with good and bad data, a run called `taken`, and one whose checkpoint is damaged."""
    directory = tmp_path_factory.mktemp("place")
    text_files(directory)
    (directory / "empty.txt").touch()
    (directory / "nothing").mkdir()
    (directory / "short.txt").write_text("too short for anything")
    (directory / "nano.txt").write_bytes(b"\0\1\2")
    (directory / "wrong.jsonl").write_text(json.dumps({"text": "right"}) + '\n{"words": "wrong"}\n')
    ids = token_ids(1500, 90)
    for prefix in ("pair", "cutbin", "cutidx", "cuthead", "alone"):
        write_indexed(directory / prefix, [ids[:700], ids[700:]], 90)
    cut(directory / "cutbin.bin", 2000)
    cut(directory / "cutidx.idx", 40)
    cut(directory / "cuthead.idx", 20)
    (directory / "alone.bin").unlink()
    ids.tofile(directory / "nano.bin")
    ids.tofile(directory / "odd.bin")
    cut(directory / "odd.bin", 2999)
    ids[:20].tofile(directory / "few.bin")
    (directory / "unknown.toml").write_text("[run]\nstepz = 2\n")
    (directory / "type.toml").write_text("[run]\nsteps = 'two'\n")
    (directory / "family.toml").write_text("family = 'bert'\n")
    flags = [*SMALL, *OF_LLAMA, *TP2, "--steps", "1", "--data", "text", "--name", "taken"]
    assert [code for code, *_ in ranks(pretrain, 2, flags, directory)] == [0, 0]
    shutil.copytree(directory / "runs" / "taken", directory / "runs" / "damaged")
    (directory / "runs" / "blocked" / ".config.toml.partial").mkdir(parents=True)
    cut(directory / "runs" / "damaged" / "checkpoints" / "step_00000001" / "model.safetensors", 1000)
    return directory


def cut(path: Path, size: int) -> None:
    """Leave the first bytes of a file."""
    path.write_bytes(path.read_bytes()[:size])


def runs(place: Path) -> list[str]:
    """The runs that --resume could find."""
    return sorted(path.parent.name for path in place.glob("*/*/config.toml"))


@pytest.mark.parametrize("name", WRONG)
def test_one_rank_says_what_is_wrong_and_both_end(name: str, place: Path, ranks: Ranks) -> None:
    flags, text = WRONG[name]
    before = time.monotonic()
    (first, out, err), (second, *silence) = ranks(pretrain, 2, [*GOOD, *TP2, *flags.split()], place)
    assert time.monotonic() - before < 30
    assert first != 0
    assert second != 0
    assert silence == ["", ""]
    assert out == ""
    assert len(messages(err)) == 1, err
    assert re.search(text, " ".join(err.split())), err
    assert "Traceback" not in err
    assert runs(place) == ["damaged", "taken"]


def without_tokenizers(arguments: list[str], directory: Path) -> tuple[int, str, str]:
    """On a rank: pretrain() where the package is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tokenizers", None)
        return pretrain(arguments, directory)


def test_a_missing_package_is_named(place: Path, ranks: Ranks) -> None:
    (first, _, err), (second, *silence) = ranks(
        without_tokenizers, 2, [*GOOD, *TP2, "--tokenizer", "wrong.jsonl"], place
    )
    assert (first, second, silence) == (2, 2, ["", ""])
    assert messages(err) == ["pretrain.py: error: wrong.jsonl needs the package tokenizers: pip install tokenizers"]


def test_a_run_that_diverges_ends_every_rank(place: Path, ranks: Ranks) -> None:
    """No wrong input by itself, but the same end: one message, and no rank that waits for another."""
    flags = [*GOOD, *TP2, "--name", "diverged", "--lr", "1e38", "--warmup-steps", "0", "--steps", "9"]
    (first, _, err), (second, _, silence) = ranks(pretrain, 2, flags, place)
    assert (first, second, silence.count("error")) == (1, 1, 0)
    (message,) = messages(err)
    assert re.search(r"gradient norm .* or loss .* is not finite at step \d", message)
    shutil.rmtree(place / "runs" / "diverged")


def on_a_full_disk(arguments: list[str], directory: Path) -> tuple[int, str, str]:
    """On a rank: pretrain() where the second rank's files may not grow beyond 4 KB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        return pretrain(arguments, directory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_ends_every_rank_and_the_run_goes_on_when_there_is_space(place: Path, ranks: Ranks) -> None:
    flags = [*GOOD, *TP2, "--name", "full"]
    (first, _, err), (second, _, silence) = ranks(on_a_full_disk, 2, flags, place)
    assert (first, second, silence.count("error")) == (1, 1, 0)
    (message,) = messages(err)
    assert re.search(r"File too large: '.*\.step_\d+\.partial/model\.safetensors'", message)
    assert list((place / "runs" / "full" / "checkpoints").iterdir()) == []
    assert [code for code, *_ in ranks(pretrain, 2, ["--resume", "--name", "full"], place)] == [0, 0]
    shutil.rmtree(place / "runs" / "full")


def test_the_good_command_line_is_good(place: Path, ranks: Ranks) -> None:
    """Without what is added to it, it trains: nothing else was wrong."""
    assert [code for code, *_ in ranks(pretrain, 2, [*GOOD, *TP2], place)] == [0, 0]
    assert (place / "runs" / "new" / "loss.png").exists()
    shutil.rmtree(place / "runs" / "new")


# at tyro's flags, which end by SystemExit, and early and late among all that ends by ValueError
LAUNCHED = ["an unknown flag", "tp of three", "batch by dp"]


@pytest.mark.parametrize("name", LAUNCHED)
def test_torchrun_ends_at_once_and_nothing_is_left(name: str, place: Path) -> None:
    """The rank that is still on its way out when torchrun sees the other's code is told to hurry (-15)."""
    flags, text = WRONG[name]
    ended = launch([*GOOD, *TP2, *flags.split()], place).end(timeout=60)
    assert ended.left == []
    assert ended.code not in (0, None)
    assert ended.seconds < 30
    assert len(messages(ended.err)) == 1, ended.err
    assert re.search(text, " ".join(ended.err.split())), ended.err
    assert "held-out loss" not in ended.out
    codes = sorted(re.findall(r"exitcode  : (-?\d+)", ended.err))
    assert codes in (["2", "2"], ["-15", "2"]), ended.err
