"""Tensors to save and load: each rank holds its parts of wholes that any process can work out again."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from tests.proofs.cases import Config, Layout, build, gpt, llama
from tpformer import Mesh
from tpformer.checkpoint.store import load_checkpoint, save_checkpoint
from tpformer.placement import Piece, Placement, load_full, placements, replicated, split

MODELS: dict[str, Config] = {
    "llama-kv1-tied": llama(num_kv_heads=1, qkv_bias=True, out_bias=True, qk_norm=True, tie_embeddings=True),
    "gpt-untied": gpt(tie_embeddings=False),
}
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def known_of(model: str, mesh: Mesh) -> dict[str, Placement]:
    """The placements of a model, and of what models do not have: a scalar, and 5 rows, 3 to a rank (some have none)."""
    known = placements(build(MODELS[model], mesh), mesh)
    return known | {
        "scalar": replicated((), mesh.tp),
        "few.rows": split((5, 2), 0, mesh.tp, max(3, -(-5 // mesh.tp.size))),
    }


def local_shape(placement: Placement) -> tuple[int, ...]:
    """Of this rank's part, with a column of padding along the split dim wherever something is split."""
    shape = list(placement.shape)
    if shape:
        shape[placement.dim] = sum(piece.size for piece in placement.pieces)
        shape[placement.dim] += placement.pieces[0].copies == 1
    return tuple(shape)


def whole(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The whole tensor of this name: random bits of every size, a negative zero and a number below the normal ones."""
    digest = int.from_bytes(hashlib.blake2b(f"{name} {seed}".encode(), digest_size=6).digest(), "little")
    generator = torch.Generator().manual_seed(digest)
    x = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-20, 20, shape, generator=generator)
    if x.numel() > 2:
        x.view(-1)[:2] = torch.tensor([-0.0, 1e-42])
    return x


def parts(known: dict[str, Placement], seed: int) -> dict[str, Tensor]:
    """This rank's part of every kind of every tensor, padding zero."""
    found = {}
    for name, placement in known.items():
        for kind in KINDS:
            local = found[f"{kind}/{name}"] = torch.empty(local_shape(placement))
            load_full(local, placement, whole(f"{kind}/{name}", placement.shape, seed))
    return found


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same shapes, to be filled: NaN wherever nothing is written."""
    return {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The names of tensors that are not the same bit for bit."""
    return [name for name in a.keys() | b.keys() if bits(a[name]) != bits(b[name])]


def bits(x: Tensor) -> bytes:
    """The bytes of a tensor, and its shape."""
    return repr(tuple(x.shape)).encode() + x.contiguous().numpy().tobytes()


def save(layout: Layout, directory: Path, step: int, model: str = "llama-kv1-tied") -> str:
    """On a rank: save the tensors whose seed is the step."""
    mesh = layout.mesh()
    known = known_of(model, mesh)
    return str(save_checkpoint(directory, step, parts(known, step), known, {"note": f"step {step}"}, mesh))


def load(layout: Layout, paths: list[Path], seed: int, model: str = "llama-kv1-tied") -> list[list[str]]:
    """On a rank: what is wrong with what each path gives."""
    mesh = layout.mesh()
    known = known_of(model, mesh)
    expected, wrong = parts(known, seed), []
    for path in paths:
        found = blank(expected)
        meta = load_checkpoint(path, found, known, mesh)
        problems = differing(expected, found)
        if (meta["step"], meta["note"]) != (seed, f"step {seed}"):
            problems.append(f"meta is {meta}")
        wrong.append(problems)
    return wrong


def tiny(step: int) -> tuple[dict[str, Tensor], dict[str, Placement]]:
    """One small tensor that says which step it is of, for one process."""
    placement = Placement((64,), 0, (Piece(0, 64),))
    return {"weight/w": torch.full((64,), float(step))}, {"w": placement}
