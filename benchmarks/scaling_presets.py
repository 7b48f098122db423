"""What `benchmarks.scaling` can be asked to measure: model shapes by degree, and what others published of the same."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from benchmarks.peers.plain import PlainLlamaConfig
from tpformer.models.gpt import GPTConfig

Model = PlainLlamaConfig | GPTConfig
"""Peers know the first only."""


@dataclass(frozen=True)
class Published:
    """Somebody's efficiencies of one axis and mode, by degree, 1 being ideal."""

    axis: str
    mode: str
    efficiency: dict[int, float]
    source: str


@dataclass(frozen=True)
class Preset:
    """One benchmark: its models, its batch, and which kinds and degrees it has if none are asked for."""

    model: Model
    """Of strong scaling, and of one process; every sample is as long as it allows."""
    grown: dict[int, Model]
    """Of weak scaling, by tp."""
    batch: int
    """Samples of a step; under weak scaling over dp, of a replica."""
    degrees: tuple[int, ...] = (1, 2, 4, 8)
    micro_batches: int = 8
    """Of a pipeline, and of the one process beside it."""
    head_blocks: int = 0
    """How many blocks the head is worth: of weak scaling over pp, blocks and head together grow with pp."""
    kinds: tuple[str, ...] = ("tpformer",)
    published: tuple[Published, ...] = field(default=())

    def model_of(self, axis: str, degree: int, mode: str) -> Model:
        """The model of a degree. Raises ValueError for a tp whose model nobody has laid down."""
        if mode == "strong" or axis == "dp" or degree == 1:
            return self.model
        if axis == "pp":
            layers = degree * (self.model.num_layers + self.head_blocks) - self.head_blocks
            return replace(self.model, num_layers=layers)
        if degree not in self.grown:
            raise ValueError(f"weak scaling has no model for tp={degree}, only for {sorted(self.grown)}")
        return self.grown[degree]

    def batch_of(self, axis: str, degree: int, mode: str) -> int:
        """Samples of a step over all replicas."""
        return self.batch * degree if (axis, mode) == ("dp", "weak") else self.batch


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, *, vocab: int, seq: int) -> PlainLlamaConfig:
    return PlainLlamaConfig(vocab, hidden, layers, heads, kv_heads, ffn, seq)


def _deeper(model: PlainLlamaConfig, head_blocks: int = 0) -> dict[int, Model]:
    """Blocks (and a head worth so many) in proportion to tp, where nobody has published how to widen."""
    blocks = model.num_layers + head_blocks
    return {tp: replace(model, num_layers=tp * blocks - head_blocks) for tp in (1, 2, 4, 8)}


def _megatron(*shapes: tuple[int, int, int]) -> dict[int, Model]:
    """(hidden, heads, layers) for tp 1, 2, 4, 8; vocabulary as padded there."""
    return {
        tp: GPTConfig(51200, hidden, layers, heads, max_seq_len=1024)
        for tp, (hidden, heads, layers) in zip((1, 2, 4, 8), shapes, strict=True)
    }


def _cpu_small() -> Preset:
    """The head is worth a block, so that blocks and head fall evenly on 2 and on 4 pipeline stages."""
    model = _llama(384, 7, 8, 4, 1024, vocab=4224, seq=128)
    grown: dict[int, Model] = {
        1: model,
        2: _llama(544, 7, 8, 4, 1456, vocab=4224, seq=128),
        4: _llama(768, 7, 8, 4, 2048, vocab=4224, seq=128),
    }
    return Preset(model, grown, batch=8, degrees=(1, 2, 4), head_blocks=1)


def _cpu_tiny() -> Preset:
    """Seconds: to see that everything runs, not to measure anything."""
    model = _llama(64, 3, 4, 2, 96, vocab=256, seq=32)
    return Preset(model, _deeper(model, 1), batch=4, degrees=(1, 2), micro_batches=4, head_blocks=1)


def _megatron_2019() -> Preset:
    models = _megatron((1536, 16, 40), (1920, 20, 54), (2304, 24, 64), (3072, 32, 72))
    figure_5 = "arXiv 1909.08053, figure 5: V100, batch 8, with activation recomputation"
    appendix_d = "arXiv 1909.08053, appendix D: speed-ups 1.64, 2.34, 2.98"
    return Preset(
        models[1],
        models,
        batch=8,
        published=(
            Published("tp", "weak", {1: 1.0, 2: 0.95, 4: 0.82, 8: 0.77}, figure_5),
            Published("tp", "strong", {1: 1.0, 2: 1.64 / 2, 4: 2.34 / 4, 8: 2.98 / 8}, appendix_d),
        ),
    )


def _megatron_2020() -> Preset:
    models = _megatron((1920, 15, 24), (2304, 18, 30), (3072, 24, 36), (4096, 32, 42))
    source = "Megatron-LM README of September 2020, A100, batch 16"
    published = Published("tp", "weak", {1: 1.0, 2: 0.917, 4: 0.845, 8: 0.747}, source)
    return Preset(models[1], models, batch=16, published=(published,))


def _llama3(hidden: int, heads: int, ffn: int, layers: int) -> Preset:
    """A few of the published model's layers, and its head."""
    model = replace(_llama(hidden, layers, heads, 8, ffn, vocab=128256, seq=4096), rope_theta=500000.0)
    return Preset(model, _deeper(model), batch=8)


def _peers() -> Preset:
    """The shape in which everybody's packages were compared before."""
    model = _llama(1024, 4, 16, 8, 2816, vocab=32000, seq=512)
    kinds = ("plain", "tpformer", "dtensor", "fsdp2", "megatron", "huggingface_tp", "torchtitan", "picotron")
    return Preset(model, _deeper(model), batch=2, degrees=(1, 2), micro_batches=2, kinds=kinds)


PRESETS = {
    "cpu-tiny": _cpu_tiny(),
    "cpu-small": _cpu_small(),
    "megatron-2019": _megatron_2019(),
    "megatron-2020": _megatron_2020(),
    "llama3-8b": _llama3(4096, 32, 14336, layers=4),
    "llama3-70b": _llama3(8192, 64, 28672, layers=2),
    "peers": _peers(),
}
