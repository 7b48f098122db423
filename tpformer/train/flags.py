"""A run's configuration from flags and TOML files, and back to TOML."""

import argparse
import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import tomli_w
import tyro

from tpformer.models.gpt import GPTConfig
from tpformer.models.llama import LlamaConfig
from tpformer.train.config import SMALL_GPT, SMALL_LLAMA, TrainConfig


def parse_config(arguments: list[str], *, quiet: bool = False) -> TrainConfig[Any]:
    """The configuration: flags over a TOML file over a resumed run's own over the defaults.

    Prints help, or what is wrong with the flags, unless quiet, and raises SystemExit; raises ValueError for
    what is wrong in a file or between values.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "family", "name", "runs-dir"):  # these decide what the other flags and defaults are
        early.add_argument(f"--{name}", default="")
    early.add_argument("--resume", action="store_true")
    chosen, _ = early.parse_known_args(arguments)

    table: dict[str, Any] = {}
    if chosen.resume:
        table = read_table(find_run(Path(chosen.runs_dir or "runs"), chosen.name) / "config.toml")
    if chosen.config:
        _merge(table, read_table(Path(chosen.config)))
    family = chosen.family or table.get("family", "llama")
    if family not in ("llama", "gpt"):
        raise ValueError(f"family ({family!r}) must be llama or gpt")
    kind: Any = TrainConfig[LlamaConfig] if family == "llama" else TrainConfig[GPTConfig]
    small: Any = kind(model=SMALL_LLAMA if family == "llama" else SMALL_GPT, family=family)
    default = from_table(small, table)
    return tyro.cli(kind, default=default, args=arguments, prog="pretrain.py", console_outputs=not quiet)


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
            changes[key] = _as_type_of(known[key], value, where)
    return dataclasses.replace(default, **changes)


def to_toml(config: TrainConfig[Any]) -> str:
    """The configuration as TOML; fields that are None are left out."""
    return tomli_w.dumps(_plain(dataclasses.asdict(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return list(value) if isinstance(value, tuple) else value


def _as_type_of(default: Any, value: Any, where: str) -> Any:
    """`value` where it has the type of `default`; an int may stand for a float, a list for a tuple."""
    if isinstance(default, tuple) and isinstance(value, list) and len(value) == len(default):
        return tuple(_as_type_of(d, v, where) for d, v in zip(default, value, strict=True))
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if default is not None and type(value) is not type(default):
        raise ValueError(f"{where} ({value!r}) must be of type {type(default).__name__}, like {default!r}")
    return value


def _merge(table: dict[str, Any], over: dict[str, Any]) -> None:
    """Put `over` into `table`, section by section."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(table.get(key), dict):
            _merge(table[key], value)
        else:
            table[key] = value
