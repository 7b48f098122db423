"""A run's configuration from flags and TOML files, and back to TOML."""

import argparse
import contextlib
import dataclasses
import io
import sys
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w
import tyro

from tpformer.checkpoint.huggingface import read_config
from tpformer.data import find_tokenizer
from tpformer.models.gpt import GPTConfig
from tpformer.models.llama import LlamaConfig
from tpformer.train.config import SMALL_GPT, SMALL_LLAMA, DataConfig, TrainConfig


def parse_config(arguments: list[str], *, quiet: bool = False) -> TrainConfig[Any]:
    """The configuration: flags over a TOML file over a resumed run's own over the defaults.

    Prints help, or what is wrong with the flags, unless quiet, and raises SystemExit; raises ValueError for
    what is wrong in a file or between values.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    # these decide what the others' defaults are
    for name in ("config", "family", "name", "runs-dir", "runs_dir", "init-from", "init_from"):
        early.add_argument(f"--{name}", default="")
    early.add_argument("--resume", action=argparse.BooleanOptionalAction)
    try:
        chosen, _ = early.parse_known_args(arguments)
    except argparse.ArgumentError:  # tyro, below, says what is wrong
        chosen = early.parse_args([])

    file = read_table(Path(chosen.config)) if chosen.config else {}
    run = from_table(TrainConfig(SMALL_LLAMA), {key: file[key] for key in ("run",) if key in file}).run
    table: dict[str, Any] = {}
    resuming = run.resume if chosen.resume is None else chosen.resume
    if resuming:
        table = read_table(find_run(Path(chosen.runs_dir or run.runs_dir), chosen.name or run.name) / "config.toml")
    _merge(table, file)
    first = "" if resuming else chosen.init_from or run.init_from
    default = from_table(_default(chosen.family or table.get("family", ""), first), table)
    kind: Any = TrainConfig[LlamaConfig] if default.family == "llama" else TrainConfig[GPTConfig]
    with contextlib.redirect_stderr(io.StringIO() if quiet else sys.stderr):  # tyro's console_outputs is not enough
        return tyro.cli(kind, default=default, args=arguments, prog="pretrain.py", console_outputs=not quiet)


def _default(family: str, init_from: str) -> TrainConfig[Any]:
    """What the settings are if nothing is said: a small model, or the model of a Hugging Face directory."""
    if family not in ("", "llama", "gpt"):
        raise ValueError(f"family ({family!r}) must be llama or gpt")
    if not init_from:
        return TrainConfig(SMALL_GPT, "gpt") if family == "gpt" else TrainConfig(SMALL_LLAMA, "llama")
    model: Any = read_config(Path(init_from))[1]
    found: Any = "gpt" if isinstance(model, GPTConfig) else "llama"
    if family not in ("", found):
        raise ValueError(f"family ({family}) must be {found}, the family of {init_from}")
    return TrainConfig(model, found, data=DataConfig(tokenizer=find_tokenizer(Path(init_from))))


def find_run(runs_dir: Path, name: str) -> Path:
    """The directory of the run called `name`, or of the latest one. Raises ValueError if there is none."""
    runs = sorted(runs_dir.glob(f"{name or '*'}/config.toml"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise ValueError(f"nothing to resume: no {runs_dir / (name or '<run>')}/config.toml")
    return runs[-1].parent


def read_table(path: Path) -> dict[str, Any]:
    """A TOML file. Raises ValueError naming it if it cannot be read."""
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} cannot be read as TOML: {error}") from error


def from_table(default: Any, table: dict[str, Any], section: str = "") -> Any:
    """`default` with the values of a table. Raises ValueError for an unknown key or a value of another type."""
    known = {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}
    types = get_type_hints(type(default))
    changes: dict[str, Any] = {}
    for key, value in table.items():
        where = f"{section}{key}"
        if key not in known:
            raise ValueError(f"unknown key {where!r} in the configuration; known here: {', '.join(known)}")
        if dataclasses.is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise ValueError(f"{where} ({value!r}) must be a section of the configuration, [{where}]")
            changes[key] = from_table(known[key], value, f"{where}.")
        else:
            changes[key] = _as_type(types[key], value, where)
    return dataclasses.replace(default, **changes)


def to_toml(config: TrainConfig[Any]) -> str:
    """The configuration as TOML; fields that are None are left out."""
    return tomli_w.dumps(_plain(dataclasses.asdict(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return list(value) if isinstance(value, tuple) else value


def _as_type(kind: Any, value: Any, where: str) -> Any:
    """`value` where it is of the type `kind`; an int may stand for a float, a list for a tuple."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is tuple:
        if parts[-1] is ...:
            parts = parts[:1] * len(value) if isinstance(value, list) else parts
        if isinstance(value, list) and len(value) == len(parts):
            return tuple(_as_type(part, item, where) for part, item in zip(parts, value, strict=True))
    elif origin is Literal:
        if value in parts:
            return value
    elif float in (kind, *parts) and type(value) is int:
        return float(value)
    elif type(value) in (kind, *parts):  # a union has parts
        return value
    wanted = f"of type {kind.__name__ if isinstance(kind, type) else kind}"
    raise ValueError(f"{where} ({value!r}) must be {f'one of {parts}' if origin is Literal else wanted}")


def _merge(table: dict[str, Any], over: dict[str, Any]) -> None:
    """Put `over` into `table`, section by section."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(table.get(key), dict):
            _merge(table[key], value)
        else:
            table[key] = value
