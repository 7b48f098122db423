"""What is wrong with a TOML file or a flag is said once, in one line or one box that names it."""

import re
from pathlib import Path

import pytest

from tpformer.train.flags import parse_config

# what is wrong with a file

WRONG_FILES = {
    "[run]\nstep = 5": r"unknown key 'run\.step' in the configuration; known here: steps, batch_size",
    "steps = 5": r"unknown key 'steps' .* known here: model, family",
    "[running]\nsteps = 5": r"unknown key 'running'",
    "[model.rope_scaling]\nkinds = 'yarn'": r"unknown key 'model\.rope_scaling\.kinds'",
    "run = 5": r"run \(5\) must be a section of the configuration, \[run\]",
    "[run]\nsteps = '5'": r"run\.steps \('5'\) must be of type int",
    "[run]\nsteps = 5.5": r"run\.steps \(5\.5\) must be of type int",
    "[run]\nsteps = true": r"run\.steps \(True\) must be of type int",
    "[run]\nname = 5": r"run\.name \(5\) must be of type str",
    "[run]\nresume = 1": r"run\.resume \(1\) must be of type bool",
    "[parallel]\nprecision = 'fp8'": r"parallel\.precision \('fp8'\) must be one of \('fp32', 'bf16', 'fp16'\)",
    "[run]\ndevice = 'gpu'": r"run\.device \('gpu'\) must be one of \('auto', 'cpu'\)",
    "[parallel]\ndp = 'two'": r"parallel\.dp \('two'\) must be of type int \| None",
    "[model]\nsliding_window = 2.5": r"model\.sliding_window \(2\.5\) must be of type int",
    "[model.rope_scaling]\nattention_factor = 'x'": r"attention_factor \('x'\) must be of type float",
    "[optimizer]\nlr = '1'": r"optimizer\.lr \('1'\) must be of type float",
    "[optimizer]\nbetas = [0.9]": r"optimizer\.betas \(\[0\.9\]\) must be of type",
    "[optimizer]\nbetas = 0.9": r"optimizer\.betas \(0\.9\) must be of type",
    "[optimizer]\nbetas = [0.9, 'x']": r"optimizer\.betas \('x'\) must be of type float",
    "[optimizer]\nschedule = 'sine'": r"optimizer\.schedule \('sine'\) must be one of \('cosine', 'wsd'",
    "[optimizer]\nlr = -1": r"lr \(-1\.0\) is out of range",
    "family = 'bert'": r"family \('bert'\) must be llama or gpt",
    "family = 5": r"family \(5\) must be llama or gpt",
    "family = 'gpt'\n[model]\nnum_kv_heads = 2": r"unknown key 'model\.num_kv_heads'",
    "[run": r"f\.toml cannot be read as TOML",
    "a = 1\na = 2": r"f\.toml cannot be read as TOML",
}


@pytest.mark.parametrize("text", WRONG_FILES)
def test_a_wrong_file_is_one_clear_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file := tmp_path / "f.toml").write_text(text)
    with pytest.raises(ValueError, match=WRONG_FILES[text]) as error:
        parse_config(["--config", str(file)])
    assert "\n" not in str(error.value)
    assert capsys.readouterr() == ("", ""), "the caller says it, once"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("missing", ".", "binary"):
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} cannot be read as TOML: ")):
            parse_config(["--config", str(tmp_path / name)])


# what is wrong with flags


@pytest.mark.parametrize(
    "flags",
    [
        *(["--stepz", "5"], ["--steps", "five"], ["--steps"], ["--precision", "fp8"], ["stray"], ["--name"]),
        *(["--resume=maybe"], ["--betas", "0.5"], ["--config"], ["--schedule", "sine"], ["--dp", "two"]),
    ],
    ids=" ".join,
)
def test_a_wrong_flag_is_one_box_or_nothing_if_quiet(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        with pytest.raises(SystemExit) as stop:
            parse_config(flags, quiet=quiet)
        assert stop.value.code == 2
        said = "".join(capsys.readouterr())
        assert said.count("pretrain.py --help") == (0 if quiet else 1), said
        assert "usage" not in said


@pytest.mark.parametrize(
    "name",
    [
        "steps",
        "batch_size",
        "log_interval",
        "micro_batch_size",
        "seed",
        "eval_interval",
        "eval_samples",
        "checkpoint_interval",
        "keep_checkpoints",
        "keep_every",
        "sample_tokens",
    ],
)
def test_counts_below_their_least_are_refused_by_name(name: str) -> None:
    least = 1 if name in ("steps", "batch_size", "log_interval") else 0
    getattr(parse_config([f"--{name.replace('_', '-')}", str(least)]).run, name)
    with pytest.raises(ValueError, match=rf"^{name} \({least - 1}\) must be at least {least}$"):
        parse_config([f"--{name.replace('_', '-')}", str(least - 1)])
