"""Hugging Face directories out, from any layout: transformers opens them as they are."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tpformer.checkpoint.chunks import Part, chunks
from tpformer.checkpoint.huggingface import config_json, family_of
from tpformer.collectives import together
from tpformer.models.gpt import GPT
from tpformer.models.llama import Llama
from tpformer.placement import local_part, mesh_of, placements

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
"""What stands beside a model's weights in its directory and is not changed by training."""
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    like: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write a GPT or Llama as a Hugging Face directory, which appears at once when it is whole; collective.

    Whole tensors in safetensors files with their index, config.json, generation_config.json. Each rank writes what it
    holds, one tensor at a time, at its place: nothing is gathered. dtype: in the files, by default the model's.
    like: the directory of the model that this one came from, whose tokenizer and special tokens go along.
    overwrite: replace a directory that has a config.json and is no checkpoint of a run.
    Raises ValueError, on every rank, for a model that no family of Hugging Face has, or a directory that is in the
    way; OSError for a disk that is full.
    """
    from tpformer.checkpoint.export import write_weights  # which imports much of torch.distributed

    mesh = mesh_of(model)
    parts, documents = together(lambda: _prepare(model, dtype, None if like is None else Path(like)), mesh.world)
    write_weights(chunks(parts), Path(directory), documents, mesh.world, overwrite=overwrite)


def model_documents(config: Any, dtype: torch.dtype, like: Path | None = None) -> dict[str, Any]:
    """The small files of a model's directory: JSON, or bytes as they are.

    like: another model's directory, whose tokenizer and special tokens are taken over. Raises ValueError for a config
    that no Hugging Face family has, or for a `like` without config.json.
    """
    found: dict[str, Any] = {"config.json": config_json(config, dtype)}
    found["generation_config.json"] = {"_from_model_config": True}
    if like is None:
        return found
    try:
        theirs = json.loads((like / "config.json").read_text())
        found["config.json"] |= {name: theirs.get(name) for name in TOKENS}
        return found | {name: (like / name).read_bytes() for name in COMPANIONS if (like / name).is_file()}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{like} is no model's directory: {error}") from error


def _prepare(model: Any, dtype: torch.dtype | None, like: Path | None) -> tuple[list[Part], dict[str, Any]]:
    if not isinstance(model, GPT | Llama):
        raise ValueError(f"a {type(model).__name__} has no place in a Hugging Face directory, only GPT and Llama")
    names = {kept.name: kept for kept in family_of(model.config).names(model.config)}
    known = placements(model, model.mesh)
    parts = [
        Part(names[name], known[name], local_part(p.detach()), dtype=dtype) for name, p in model.named_parameters()
    ]
    return parts, model_documents(model.config, dtype or parts[0].local.dtype, like)
