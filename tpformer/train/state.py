"""What of a run is in its checkpoints, and what of it must be the same for the run to go on."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpformer.checkpoint.chunks import Part
from tpformer.checkpoint.huggingface import Pretrained, config_json, family_of
from tpformer.checkpoint.store import META, OPTIMIZER, plain, verify, versions
from tpformer.collectives import together
from tpformer.mesh import Mesh
from tpformer.placement import Placement
from tpformer.train.config import TrainConfig
from tpformer.train.optimizer import Optimizer

MAY_CHANGE = ("dropout", "attention_dropout", "init_std", "max_seq_len", "backend")
"""Of a model's config, what leaves the weights' meaning as it is; a table of positions has its length in its shape."""


def parts_of(state: dict[str, Tensor], known: dict[str, Placement], config: Any) -> list[Part]:
    """The optimizer's state, by kind/name, with where it is kept: weights as a Hugging Face directory has them."""
    names = {kept.name: kept for kept in family_of(config).names(config)}
    parts = []
    for key, local in state.items():
        kind, name = key.split("/", 1)
        if kind == "weight":
            parts.append(Part(names[name], known[name], local))
        else:
            parts.append(Part(names[name].prefixed(f"{kind}."), known[name], local, OPTIMIZER))
    return parts


def documents(config: Any, meta: dict[str, Any]) -> dict[str, Any]:
    """The JSON files of a checkpoint; without config.json where no Hugging Face family has such a model."""
    try:
        about = config_json(config, torch.float32)
    except ValueError:
        return {META: meta}
    return {"config.json": about, "generation_config.json": {"_from_model_config": True}, META: meta}


def meta_of(config: TrainConfig[Any], model: Any, mesh: Mesh, step: int, optimizer: Optimizer) -> dict[str, Any]:
    """Everything but tensors that a run needs to go on, and who wrote it."""
    found: dict[str, Any] = {
        "samples": step * config.run.batch_size,
        "data": _data(config),
        "updates": optimizer.steps,
        "model": plain(model),
        "layout": {name: getattr(mesh, name).size for name in ("pp", "dp", "dp_shard", "tp")},
        "versions": versions(),
    }
    if optimizer.scaler is not None:
        found["loss_scaler"] = optimizer.scaler.state()
    return found


def check_meta(path: Path, meta: dict[str, Any], config: TrainConfig[Any], model: Any) -> None:
    """Raises ValueError naming what differs, where the run of a checkpoint cannot go on with this configuration."""
    check_model(path, meta["model"], model)
    if meta["step"] and (differing := _differing(meta["data"], _data(config))):
        raise ValueError(f"{path} was made with {differing}: the order of the data would change")


def check_model(path: Path, theirs: dict[str, Any], model: Any) -> None:
    """Raises ValueError naming what differs between the model of a directory and the one to be trained."""
    if differing := _differing(theirs, plain(model), MAY_CHANGE):
        raise ValueError(f"{path} was made with another model: {differing}")


def begin_with(directory: Path, optimizer: Optimizer, model: Any, mesh: Mesh) -> None:
    """Take over the weights of a Hugging Face directory, or of a run's checkpoint; collective.

    Raises ValueError, on every rank, for one that is damaged or of another model; of a checkpoint's bytes each rank
    verifies a share.
    """

    def matching() -> Pretrained:
        if (directory / META).exists():
            verify(directory, mesh.world.rank, mesh.world.size)
        opened = Pretrained.open(directory, max_seq_len=model.max_seq_len)  # a table of positions has that many
        check_model(directory, plain(opened.config), model)
        return opened

    opened = together(matching, mesh.world)
    together(lambda: optimizer.load_weights(opened.fill), mesh.world)


def _differing(theirs: dict[str, Any], ours: dict[str, Any], may: tuple[str, ...] = ()) -> str:
    names = [name for name in ours | theirs if name not in may and ours.get(name) != theirs.get(name)]
    return ", ".join(f"{name} {theirs.get(name)!r}, not {ours.get(name)!r}" for name in names)


def _data(config: TrainConfig[Any]) -> dict[str, int]:
    """What the order of the samples depends on."""
    return {"batch_size": config.run.batch_size, "seq_len": config.data.seq_len, "seed": config.run.seed}
