"""A user's own module for `tpformer plan`: a function of a file that returns it with example inputs."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn


def load_module(place: str) -> tuple[nn.Module, Any]:
    """What FILE.py:FUNCTION returns, called without arguments: a module and its example inputs, on the meta device.

    inputs: as `module_traffic` takes them. Raises ValueError for a place that is not such a function, and for one
    that fails or returns something else.
    """
    file, _, name = place.rpartition(":")
    path = Path(file)
    if not path.is_file() or not name.isidentifier():
        raise ValueError(f"--module ({place}) must be FILE.py:FUNCTION, and the file must be there")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--module ({place}): {path} is no Python file")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, loaded)  # dataclasses look their module up
    try:
        spec.loader.exec_module(loaded)
        with torch.device("meta"):
            found = getattr(loaded, name)()
    except Exception as error:  # whatever a user's file raises
        raise ValueError(f"--module ({place}) failed: {type(error).__name__}: {error}") from error
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], nn.Module)):
        raise ValueError(f"--module ({place}) must return a module and its example inputs, not {type(found).__name__}")
    return found
