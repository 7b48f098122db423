"""What the proofs run: the models, the layouts, what is measured on each, and the one check that compares."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

import tpformer
from tpformer import GPT, GPTConfig, Key, Llama, LlamaConfig, Mesh, RopeScaling

Config = GPTConfig | LlamaConfig
Measured = dict[str, np.ndarray]
"""The loss, the logits, and the gradient of every parameter by name (plain arrays: they cross a pipe)."""

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
IGNORED = -100


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism to run one model with."""

    tp: int = 1
    dp: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        """Processes that it takes."""
        return self.tp * self.dp

    def __str__(self) -> str:
        return f"tp{self.tp}" + (f"dp{self.dp}" if self.dp > 1 else "") + ("sp" if self.sequence_parallel else "")

    def mesh(self) -> Mesh:
        """The mesh, on a rank."""
        return Mesh.create(tp=self.tp, dp=self.dp, sequence_parallel=self.sequence_parallel, device="cpu")


LAYOUTS = [Layout(tp, dp, sp) for tp, dp in ((1, 1), (2, 1), (4, 1), (2, 2)) for sp in (False, True)]
RUNS = [(layout, torch.float64) for layout in LAYOUTS]
RUNS += [(layout, torch.float32) for layout in (Layout(2, 1, True), Layout(4), Layout(4, 1, True), Layout(2, 2))]
"""The proof is fp64's; fp32 adds that nothing is rounded on the way, which fewer layouts show as well."""


def gpt(**options: object) -> GPTConfig:
    """A tiny GPT, with everything that the options leave open."""
    sizes = {"vocab_size": 101, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 12}
    return GPTConfig(**(sizes | options))  # type: ignore[arg-type]


def llama(**options: object) -> LlamaConfig:
    """A tiny Llama, with everything that the options leave open."""
    sizes = {
        "vocab_size": 101,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "ffn_hidden_size": 40,
        "max_seq_len": 16,
    }
    return LlamaConfig(**(sizes | options))  # type: ignore[arg-type]


VARIANTS: dict[str, Config] = {
    "gpt-tied": gpt(),
    "gpt-untied-257-relu": gpt(tie_embeddings=False, vocab_size=257, activation="relu", ffn_hidden_size=40),
    "llama-heads-untied": llama(),
    "llama-8-heads-kv4-tied-257": llama(num_heads=8, num_kv_heads=4, tie_embeddings=True, vocab_size=257),
    "mistral-kv2-window": llama(num_kv_heads=2, sliding_window=3),
    "qwen2-kv2-bias-tied": llama(num_kv_heads=2, qkv_bias=True, tie_embeddings=True),
    "qwen2-kv1-bias": llama(num_kv_heads=1, qkv_bias=True, vocab_size=257),
    "qwen3-kv4-wide-heads": llama(num_kv_heads=4, qk_norm=True, head_dim=12, tie_embeddings=True),
    "qwen3-kv2-wide-heads": llama(num_kv_heads=2, qk_norm=True, head_dim=12),
    "llama-kv1-out-bias-gelu-yarn": llama(
        num_kv_heads=1, out_bias=True, activation="gelu", rope_scaling=RopeScaling("yarn", 4.0, 8)
    ),
}
"""Grouped queries with KV heads above, equal to and below tp 2 and 4; 101 and 257 tokens divide by neither."""


def build(config: Config, mesh: Mesh = Mesh(), seed: int = 0) -> GPT | Llama:
    """The model of a config."""
    return GPT(config, mesh, seed=seed) if isinstance(config, GPTConfig) else Llama(config, mesh, seed=seed)


def build_random(config: Config, mesh: Mesh, dtype: torch.dtype) -> GPT | Llama:
    """The model with weights in which no number is special: no norm is 1, no bias 0, on any layout the same."""
    model = build(config, mesh).to(dtype)
    generator = torch.Generator().manual_seed(1)
    whole = {}
    for name, placement in tpformer.placements(model, mesh).items():
        mean = 1.0 if "norm" in name and not name.endswith("bias") else 0.0
        whole[name] = mean + 0.25 * torch.randn(placement.shape, generator=generator, dtype=torch.float64)
    tpformer.load_full_state(model, whole)
    return model


def random_batch(vocab_size: int, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets (4, 8); two targets ignored in each half of the batch, so that the halves weigh the same."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(vocab_size, (2, 4, 8), generator=generator)
    targets[[0, 1, 2, 2], [3, 7, 0, 5]] = IGNORED
    return tokens, targets


def measure_model(model: GPT | Llama, key: Key | None = None, seed: int = 2, samples: int = 4) -> Measured:
    """Loss, logits and gradients of a model for the batch's first samples, each replica computing its own of them."""
    dp = model.mesh.dp
    tokens, targets = (x[:samples].chunk(dp.size)[dp.rank] for x in random_batch(model.config.vocab_size, seed))
    if key is not None:
        key = Key(key.seed, sample=dp.rank * tokens.shape[0])
    with torch.no_grad():
        logits = _stack_over_dp(model.full_logits(tokens), model.mesh)
    loss = model.loss(tokens, targets, key=key)
    loss.backward()
    tpformer.reduce_partial_gradients(model)
    gradients = {name: tpformer.full_gradient(model, name) for name, _ in model.named_parameters()}
    averaged = {name: _stack_over_dp(x.unsqueeze(0), model.mesh).mean(0) for name, x in gradients.items()}
    averaged["loss"] = _stack_over_dp(loss.detach().unsqueeze(0), model.mesh).mean(0)
    return {name: x.numpy() for name, x in (averaged | {"logits": logits}).items()}


def measure(variant: str, layout: Layout, dtype: torch.dtype) -> Measured:
    """On a rank: build one of VARIANTS on the layout and measure it."""
    return measure_model(build_random(VARIANTS[variant], layout.mesh(), dtype))


def mismatches(reference: Measured, found: Measured, tolerance: float) -> list[str]:
    """The names whose largest error, relative to the largest number of the reference, is beyond the tolerance."""
    wrong = [f"{name} is only in one of them" for name in reference.keys() ^ found.keys()]
    for name in reference.keys() & found.keys():
        a, b = reference[name], found[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            wrong.append(f"{name} is {b.dtype} {b.shape}, expected {a.dtype} {a.shape}")
        elif not (error := np.abs(a - b).max() / np.abs(a).max()) <= tolerance:  # a NaN is wrong too
            wrong.append(f"{name} differs by {error:.1e}")
    return sorted(wrong)


def _stack_over_dp(x: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Every replica's x, one after another along dim 0."""
    if mesh.dp.size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(mesh.dp.size)]
    dist.all_gather(parts, x.contiguous(), group=mesh.dp.group)
    return torch.cat(parts)
