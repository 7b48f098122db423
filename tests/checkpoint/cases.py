"""Tensors to save and load: each rank holds its parts of wholes that any process can work out again."""

import hashlib
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from tests.proofs.cases import Config, Layout, build, gpt, llama
from tpformer import Mesh
from tpformer.checkpoint.background import Checkpoints
from tpformer.checkpoint.boxes import Kept
from tpformer.checkpoint.chunks import Part, chunks
from tpformer.checkpoint.digests import NAME, bytes_of
from tpformer.checkpoint.files import write_file
from tpformer.checkpoint.huggingface import family_of
from tpformer.checkpoint.store import (
    META,
    OPTIMIZER,
    Retention,
    load_checkpoint,
    read_checksums,
    read_meta,
    save_checkpoint,
    signed,
)
from tpformer.mesh import Axis
from tpformer.placement import Piece, Placement, load_full, placements, replicated, split

MODELS: dict[str, Config] = {
    "llama-kv1-tied": llama(num_kv_heads=1, qkv_bias=True, out_bias=True, qk_norm=True, tie_embeddings=True),
    "gpt-untied": gpt(tie_embeddings=False),
}
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def known_of(model: str, mesh: Mesh) -> dict[str, Placement]:
    """The placements of a model, and of what models do not have: a scalar, and 5 rows, 3 to a rank (some have none)."""
    known = placements(build(MODELS[model], mesh), mesh)
    others = {
        "scalar": replicated((), mesh.tp),
        "few.rows": split((5, 2), 0, mesh.tp, max(3, -(-5 // mesh.tp.size))),
    }
    return known | {name: replace(placement, replica=mesh.dp.rank) for name, placement in others.items()}


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


def names_of(model: str) -> dict[str, Kept]:
    """Where each is kept: as its family does, and under its own name what models do not have."""
    config = MODELS[model]
    found = {kept.name: kept for kept in family_of(config).names(config)}
    return found | {name: Kept(name, (name,)) for name in ("scalar", "few.rows")}


def parts(model: str, mesh: Mesh, seed: int) -> list[Part]:
    """This rank's part of every kind of every tensor, padding zero."""
    names, found = names_of(model), []
    for name, placement in known_of(model, mesh).items():
        for kind in KINDS:
            local = torch.empty(local_shape(placement))
            load_full(local, placement, whole(f"{kind}/{name}", placement.shape, seed))
            kept, folder = (names[name], "") if kind == "weight" else (names[name].prefixed(f"{kind}."), OPTIMIZER)
            found.append(Part(kept, placement, local, folder))
    return found


def blank(found: list[Part]) -> list[Part]:
    """The same, to be filled: NaN wherever nothing is written."""
    return [replace(part, local=torch.full_like(part.local, torch.nan)) for part in found]


def differing(a: list[Part], b: list[Part]) -> list[str]:
    """The names of tensors that are not the same bit for bit."""
    return [x.kept.tensors[0] for x, y in zip(a, b, strict=True) if bits(x.local) != bits(y.local)]


def bits(x: Tensor) -> bytes:
    """The bytes of a tensor, and its shape."""
    return repr(tuple(x.shape)).encode() + x.contiguous().numpy().tobytes()


def save(layout: Layout, directory: Path, step: int, model: str = "llama-kv1-tied", background: bool = False) -> None:
    """On a rank: save the tensors whose seed is the step."""
    mesh = layout.mesh()
    checkpoints = Checkpoints(directory, mesh, background=background)
    checkpoints.save(step, parts(model, mesh, step), {META: {"note": f"step {step}"}, "config.json": {"a": 1}})
    checkpoints.wait()


def load(layout: Layout, paths: list[Path], seed: int, model: str = "llama-kv1-tied") -> list[list[str]]:
    """On a rank: what is wrong with what each path gives."""
    mesh = layout.mesh()
    expected, wrong = parts(model, mesh, seed), []
    for path in paths:
        found = blank(expected)
        meta = load_checkpoint(path, found, mesh.world)
        problems = differing(expected, found)
        if (meta["step"], meta["note"]) != (seed, f"step {seed}"):
            problems.append(f"meta is {meta}")
        wrong.append(problems)
    return wrong


def tiny(value: float) -> Part:
    """One small tensor of one value, for one process."""
    return Part(Kept("w", ("w",)), Placement((64,), 0, (Piece(0, 64),)), torch.full((64,), float(value)))


def save_tiny(directory: Path, step: int, value: float | None = None, retention: Retention = Retention()) -> Path:
    """The tensor that says which step it is of, or of a value, and what of old ones is to stay."""
    found = chunks([tiny(step if value is None else value)])
    return save_checkpoint(directory, step, found, {}, retention=retention)


def load_tiny(path: Path) -> tuple[int, float]:
    """The step of such a checkpoint, and the value of its tensor."""
    part = tiny(-1)
    step = load_checkpoint(path, [part], Axis("world"))["step"]
    (value,) = part.local.unique().tolist()
    return step, value


def sign_again(path: Path) -> None:
    """Give a checkpoint that was changed on purpose the checksums of what is there now."""
    meta = read_meta(path)
    sums = read_checksums(path, meta)
    del meta["checksums"]
    files, digests = {}, []
    for name in sums.files:
        content = (path / name).read_bytes()
        first = 8 + int.from_bytes(content[:8], "little") if name.endswith(".safetensors") else len(content)
        files[name] = (len(content), first, zlib.crc32(content[:first]))
    for digest in sums.digests:
        with safe_open(path / sums.tensors[digest.key], framework="pt") as file:
            box = tuple(slice(a, a + n) for a, n in zip(digest.start, digest.size, strict=True))
            name = digest.key.rpartition("/")[2]
            numbers = (file.get_slice(name)[box] if box else file.get_tensor(name)).contiguous()
        digests.append(replace(digest, crc32=zlib.crc32(bytes_of(numbers))))
    text = replace(sums, files=files, digests=digests).text()
    write_file(path / NAME, text)
    write_file(path / META, signed(meta, text))
