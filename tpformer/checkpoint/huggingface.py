"""Hugging Face directories in: anyone's Llama at any layout, each rank reading its slices only."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tpformer.checkpoint.boxes import Kept, boxes
from tpformer.checkpoint.families import gpt2, llama, mistral, qwen2, qwen3
from tpformer.checkpoint.fields import Fields
from tpformer.checkpoint.reading import DTYPES, Source, Stored, differences, renamed, stored_tensors, summary
from tpformer.collectives import together
from tpformer.mesh import Mesh
from tpformer.models.decoder import Part
from tpformer.models.gpt import GPT, GPTConfig
from tpformer.models.llama import Llama, LlamaConfig
from tpformer.parallel.split import part_of, stage_parts
from tpformer.parallel_config import ParallelConfig
from tpformer.placement import Piece, Placement, local_part, placements

FAMILIES = {family.MODEL_TYPE: family for family in (gpt2, llama, mistral, qwen2, qwen3)}
Config = GPTConfig | LlamaConfig


@dataclass(frozen=True)
class Pretrained:
    """A Hugging Face directory whose config.json and headers have been read, and fit each other."""

    directory: Path
    config: Config
    names: dict[str, Kept]  # by our parameters' names
    stored: dict[str, Stored]  # by the family's names

    @staticmethod
    def open(directory: str | Path, **changes: Any) -> "Pretrained":
        """Read config.json and the headers; changes: fields of our config that are to be other than there.

        Raises ValueError naming every field and tensor that is missing, unknown, misshapen or not supported.
        """
        path = Path(directory)
        family, config = read_config(path)
        config = replace(config, **changes)
        names = {kept.name: kept for kept in family.names(config)}
        stored = renamed(stored_tensors(path), family.PREFIX, family.IGNORED)
        expected = expected_shapes(config, names)
        if config.tie_embeddings and "lm_head.weight" in stored:  # a copy, whose numbers fill() compares
            expected["lm_head.weight"] = expected[names["embedding.weight"].tensors[0]]
        wrong = differences(stored, expected)
        if wrong:
            raise ValueError(f"{path} does not fit its config.json: {summary(wrong)}")
        return Pretrained(path, config, names, stored)

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of its tensors."""
        dtypes = [DTYPES[each.dtype] for each in self.stored.values() if each.dtype in DTYPES]
        widest = dtypes[0]
        for dtype in dtypes:
            widest = torch.promote_types(widest, dtype)
        return widest

    def fill(self, tensors: dict[str, Tensor], known: dict[str, Placement]) -> None:
        """Read this rank's part of each parameter, by name, in place; nothing is communicated.

        Raises ValueError if a tied head has other weights than the embedding.
        """
        with Source(self.stored) as source:
            for name, local in tensors.items():
                source.fill(local, boxes(self.names[name], known[name]))
            if "embedding.weight" in tensors:
                self.check_tied(source, known["embedding.weight"])

    def check_tied(self, source: Source, placement: Placement | None = None) -> None:
        """Raises ValueError if a tied head has other weights than the embedding, as far as a rank holds that."""
        if "lm_head.weight" not in self.stored or not self.config.tie_embeddings:
            return
        name = self.names["embedding.weight"].tensors[0]
        whole = Placement(self.stored[name].shape, 0, (Piece(0, self.stored[name].shape[0]),))
        for box in boxes(self.names["embedding.weight"], placement or whole):
            if not torch.equal(source.read(box), source.read(replace(box, tensor="lm_head.weight"))):
                raise ValueError(
                    f"{self.directory}: lm_head.weight differs from the embedding, but config.json ties them: "
                    'set "tie_word_embeddings": false there'
                )


def load_pretrained(
    directory: str | Path,
    *,
    mesh: Mesh = Mesh(),
    dtype: torch.dtype | None = None,
    part: Part | None = None,
    **changes: Any,
) -> Any:
    """A model with the weights of a Hugging Face directory (gpt2, llama, mistral, qwen2, qwen3) of safetensors.

    Each rank reads its slices only; on a mesh with pp > 1 those of its layers, by default of one stage a rank, balanced
    as ParallelConfig does. dtype: of the model, by default the file's widest. changes: fields of GPTConfig or
    LlamaConfig that do not change the weights, such as attention_dropout or backend.
    Raises ValueError, on every rank and before any weight is read, naming all that is wrong or not supported.
    """
    found: Any = together(lambda: Pretrained.open(directory, **changes), mesh.world)
    kind: Any = GPT if isinstance(found.config, GPTConfig) else Llama
    if part is None and mesh.pp.size > 1:
        layout = ParallelConfig(pp=mesh.pp.size)
        part = part_of(mesh.pp.rank, stage_parts(found.config, layout, found.config.max_seq_len), layout)
    model = together(lambda: kind(found.config, mesh, seed=None, part=part), mesh.world)
    model.to(dtype or found.dtype)
    model.to_empty(device=mesh.device)
    load_weights(model, found, mesh)
    return model


def load_weights(model: nn.Module, source: Pretrained, mesh: Mesh) -> None:
    """Fill the parameters of a model that has been laid out already (a pipeline's part, FSDP); collective.

    Raises ValueError, on every rank, for a tied head with weights of its own, or a file that cannot be read.
    """
    tensors = {name: local_part(p.detach()) for name, p in model.named_parameters()}
    together(lambda: source.fill(tensors, placements(model, mesh)), mesh.world)


def read_config(directory: Path) -> tuple[ModuleType, Config]:
    """The family and our config of a directory's config.json.

    Raises ValueError naming an unknown model_type, or every field that is wrong or not supported.
    """
    path = directory / "config.json"
    try:
        table = json.loads(path.read_text())
        kind = table.pop("model_type")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{path} is missing: give a Hugging Face directory on this machine (nothing is downloaded), "
            "or one of a run's checkpoints, <run>/checkpoints/step_..."
        ) from error
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read, is damaged or without a model_type: {error!r}") from error
    if kind not in FAMILIES:
        raise ValueError(f"{path}: model_type {kind!r} is not supported, only {', '.join(FAMILIES)}")
    fields = Fields(table)
    values = FAMILIES[kind].read(fields)
    fields.check()
    if fields.problems:
        raise ValueError(f"{path}: {'; '.join(fields.problems)}")
    try:
        return FAMILIES[kind], (GPTConfig if kind == "gpt2" else LlamaConfig)(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def family_of(config: Config) -> ModuleType:
    """The family whose models have such a config."""
    if isinstance(config, GPTConfig):
        return gpt2
    if config.qk_norm:
        return qwen3
    if config.qkv_bias and not config.out_bias:
        return qwen2
    return llama if config.sliding_window is None else mistral


def config_json(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says of a model. Raises ValueError if no family has such a model."""
    family = family_of(config)
    about = {"architectures": [family.ARCHITECTURE], "model_type": family.MODEL_TYPE}
    # transformers' own defaults would be tokens of somebody else's vocabulary
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return about | {"dtype": str(dtype).removeprefix("torch.")} | family.write(config) | tokens


def expected_shapes(config: Config, names: dict[str, Kept]) -> dict[str, tuple[int, ...]]:
    """The whole shape of every tensor of a directory, by the family's names."""
    model = (GPT if isinstance(config, GPTConfig) else Llama)(config, seed=None)  # type: ignore[arg-type]
    known = placements(model, Mesh())
    return {tensor: shape for name, kept in names.items() for tensor, shape in kept.shapes(known[name].shape).items()}
