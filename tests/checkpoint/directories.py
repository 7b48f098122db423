"""Hugging Face directories made by transformers from tiny random models, one a family and option.

Nothing at the top imports transformers: the ranks, which load this file too, have no use for it.
"""

import json
from pathlib import Path
from typing import Any

import torch

import tpformer
from tests.proofs.cases import Measured, measure_model
from tpformer import Mesh

GPT2 = ("tied-gelu-tanh", "untied-gelu-257", "tied-relu-narrow")


def save_case(case: str, directory: Path, **options: Any) -> Path:
    """The directory of one of the cases of tests/models/test_transformers_*, written by transformers."""
    from tests.models import test_transformers_gpt2, test_transformers_llama

    if case in GPT2:
        model = test_transformers_gpt2.oracle(case)
    else:
        model = test_transformers_llama.oracle(case, "eager")
    model.save_pretrained(directory, **options)
    return directory


def edit_config(directory: Path, **changes: Any) -> Path:
    """Change fields of its config.json; None removes one."""
    path = directory / "config.json"
    table = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in table.items() if value is not None}))
    return directory


def measure_directory(directory: Path, degrees: tuple[int, ...], dtype: torch.dtype) -> list[Measured]:
    """On a rank: open it at each tp, the rest of the processes being replicas, and measure it."""
    meshes = [Mesh.create(tp=tp, device="cpu") for tp in degrees]
    return [measure_model(tpformer.load_pretrained(directory, mesh=mesh, dtype=dtype)) for mesh in meshes]
