"""Every setting is a flag with help and a key of a TOML file; flags come before files, and files before runs."""

import ast
import dataclasses
import inspect
import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tpformer.train.config import SMALL_GPT, SMALL_LLAMA, RunConfig, TrainConfig
from tpformer.train.flags import find_run, from_table, parse_config, to_toml

FAMILIES: dict[str, TrainConfig[Any]] = {
    "llama": TrainConfig(SMALL_LLAMA),
    "gpt": TrainConfig(SMALL_GPT, family="gpt"),
}


def settings(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The flag and the docstring of every field, recursively; sections have no name of their own in a flag."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(type(config)))).body[0]
    assert isinstance(body, ast.ClassDef)
    documented = {
        field.target.id: ast.literal_eval(text.value)
        for field, text in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr)
    }
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            section = "" if isinstance(config, TrainConfig) else f"{prefix}{field.name}."
            yield from settings(value, section.replace("_", "-"))
        else:
            yield f"--{prefix}{field.name.replace('_', '-')}", documented[field.name]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_is_a_flag_with_its_help(
    family: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        parse_config(["--family", family, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    found = dict(settings(FAMILIES[family]))
    assert len(found) > 40
    assert {"--tp", "--lr", "--data", "--batch-size", "--hidden-size", "--config"} <= found.keys()
    for flag, documented in found.items():
        help_text = re.escape(" ".join(documented.split()))
        assert re.search(rf" {re.escape(flag)}[ ,](?:(?! --(?!no-)).)*? {help_text} \(default: ", text), flag


FLAGS = [
    "--hidden-size",
    "48",
    "--num-layers",
    "3",
    "--num-heads",
    "4",
    "--activation",
    "gelu",
    "--dropout",
    "0.25",
    "--norm-eps",
    "1e-6",
    "--init-std",
    "0.5",
    "--vocab-size",
    "300",
    "--max-seq-len",
    "99",
    "--steps",
    "7",
    "--batch-size",
    "6",
    "--micro-batch-size",
    "2",
    "--precision",
    "bf16",
    "--z-loss",
    "1e-4",
    "--seed",
    "5",
    "--prompt",
    'a"b\\c\n',
    "--log-interval",
    "3",
    "--keep-checkpoints",
    "0",
    "--keep-every",
    "5",
    "--no-async-checkpoint",
    "--runs-dir",
    "some/where",
    "--name",
    "x",
    "--device",
    "cpu",
    "--data",
    "*.txt",
    "--tokenizer",
    "t.json",
    "--validation-part",
    "0.5",
    "--seq-len",
    "31",
    "--tp",
    "4",
    "--dp",
    "2",
    "--sequence-parallel",
    "--overlap",
    "chunked",
    "--lr",
    "1",
    "--schedule",
    "wsd",
    "--betas",
    "0.5",
    "0.75",
    "--clip-norm",
    "0",
]
OF_FAMILY = {
    "llama": [
        "--num-kv-heads",
        "1",
        "--head-dim",
        "6",
        "--sliding-window",
        "9",
        "--qk-norm",
        "--rope-theta",
        "1e6",
        "--rope-scaling.kind",
        "yarn",
        "--rope-scaling.factor",
        "2",
        "--rope-scaling.attention-factor",
        "1.5",
    ],
    "gpt": ["--ffn-hidden-size", "17", "--no-tie-embeddings"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_is_the_same_after_toml(family: str, tmp_path: Path) -> None:
    """With most of its fields changed, and with none; fields that are None are left out and come back as None."""
    file = tmp_path / "config.toml"
    for flags in ([], [*FLAGS, *OF_FAMILY[family]]):
        config = parse_config(["--family", family, *flags])
        file.write_text(to_toml(config))
        again = parse_config(["--config", str(file)])
        assert replace(again, config="") == config
        assert type(again.model) is type(config.model)
        tables = tomllib.loads(file.read_text())
        assert tables.keys() == {"model", "family", "config", "run", "data", "parallel", "optimizer"}
    assert config.optimizer.lr == 1.0
    assert (config.run.prompt, config.parallel.dp, config.optimizer.betas) == ('a"b\\c\n', 2, (0.5, 0.75))
    assert config.model.activation == "gelu"


def write(path: Path, text: str) -> str:
    """A TOML file's name."""
    path.write_text(text)
    return str(path)


def some_run(tmp_path: Path, name: str, **options: Any) -> Path:
    """A run's directory, with its configuration."""
    directory = tmp_path / "runs" / name
    directory.mkdir(parents=True)
    run = RunConfig(runs_dir=str(tmp_path / "runs"), name=name, **options)
    (directory / "config.toml").write_text(to_toml(replace(FAMILIES["llama"], run=run)))
    return directory


def test_flags_come_before_the_file_and_the_file_before_the_run(tmp_path: Path) -> None:
    some_run(tmp_path, "old", steps=1, batch_size=11, seed=111)
    file = write(tmp_path / "f.toml", "[run]\nbatch_size = 22\nseed = 222\n[optimizer]\nlr = 2\n")
    runs = ["--runs-dir", str(tmp_path / "runs")]
    plain = parse_config([])
    config = parse_config(["--resume", *runs, "--config", file, "--seed", "333"])
    assert (config.run.steps, config.run.batch_size, config.run.seed) == (1, 22, 333)
    assert config.run.resume
    assert config.optimizer == replace(plain.optimizer, lr=2.0)
    assert (plain.run.steps, plain.run.batch_size, plain.run.seed) == (RunConfig.steps, RunConfig.batch_size, 0)
    assert parse_config(["--config", file]).run.steps == RunConfig.steps != 1
    assert parse_config(["--resume", *runs]).run.batch_size == 11


def test_what_is_derived_from_sizes_is_derived_from_those_of_flag_and_file(tmp_path: Path) -> None:
    """The width of a head is hidden_size over num_heads, wherever each of them comes from, unless it is given."""
    file = write(tmp_path / "f.toml", "[model]\nhidden_size = 64\nnum_heads = 2\n")
    assert parse_config(["--hidden-size", "96", "--num-heads", "4"]).model.attention.head_dim == 24
    assert parse_config(["--config", file]).model.attention.head_dim == 32
    assert parse_config(["--config", file, "--num-heads", "8"]).model.attention.head_dim == 8
    assert parse_config(["--config", file, "--head-dim", "6"]).model.attention.head_dim == 6


def test_a_file_s_sections_are_merged_key_by_key(tmp_path: Path) -> None:
    """A key of a section, or of a section in it, leaves its neighbours as they were."""
    some_run(tmp_path, "old", steps=5)
    text = "[model]\nnum_layers = 2\n[model.rope_scaling]\nfactor = 3\n"
    found = parse_config(
        ["--resume", "--runs-dir", str(tmp_path / "runs"), "--config", write(tmp_path / "f.toml", text)]
    )
    model = SMALL_LLAMA
    assert found.model == replace(model, num_layers=2, rope_scaling=replace(model.rope_scaling, factor=3.0))


@pytest.mark.parametrize("spelling", ["--runs-dir", "--runs_dir"])
@pytest.mark.parametrize("equals", [False, True])
def test_what_is_resumed_is_found_however_it_is_said(spelling: str, equals: bool, tmp_path: Path) -> None:
    some_run(tmp_path, "one", steps=1)
    some_run(tmp_path, "two", steps=2)
    runs = str(tmp_path / "runs")
    where = [f"{spelling}={runs}"] if equals else [spelling, runs]
    for name, steps in (("one", 1), ("two", 2)):
        assert parse_config(["--resume", *where, "--name", name]).run.steps == steps
    text = f'[run]\nresume = true\nruns_dir = "{runs}"\nname = "one"\n'
    file = write(tmp_path / "f.toml", text)
    assert parse_config(["--config", file]).run == RunConfig(steps=1, resume=True, runs_dir=runs, name="one")
    assert parse_config(["--config", file, "--name", "two"]).run.steps == 2
    assert not parse_config(["--config", file, "--no-resume"]).run.resume


def test_the_latest_run_is_resumed_where_none_is_named(tmp_path: Path) -> None:
    for number, name in enumerate(("b", "a", "c")):
        some_run(tmp_path, name)
        os.utime(tmp_path / "runs" / name / "config.toml", (number, 1000 * (number == 1) + number))
    (tmp_path / "runs" / "not-a-run").mkdir()
    assert find_run(tmp_path / "runs", "").name == "a"
    assert find_run(tmp_path / "runs", "c").name == "c"


def test_an_int_may_stand_for_a_float_and_nothing_else_is_changed() -> None:
    found = from_table(FAMILIES["llama"], {"optimizer": {"lr": 2, "betas": [0, 0.5]}, "run": {"z_loss": 1}})
    assert found == replace(
        FAMILIES["llama"],
        optimizer=replace(found.optimizer, lr=2.0, betas=(0.0, 0.5)),
        run=RunConfig(z_loss=1.0),
    )
    assert [type(x) for x in (found.optimizer.lr, *found.optimizer.betas, found.run.z_loss)] == [float] * 4
