"""Models that were not made of tpformer's layers, their plans, and what is measured on them, split or not."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tpformer
from tests.models.oracle import in_double, measure_oracle, randomise
from tests.proofs.cases import Layout, Measured, random_batch
from tpformer import Mesh
from tpformer.parallel.data import GradientBuckets
from tpformer.parallel.plan import Style
from tpformer.train.optimizer import Optimizer
from tpformer.train.schedule import OptimizerConfig

Plan = dict[str, Style]
ATTENTION: Plan = {"*.self_attn.[qkv]_proj": "column", "*.self_attn.o_proj": "row"}
MLP: Plan = {"*.mlp.gate_proj": "column", "*.mlp.up_proj": "column", "*.mlp.down_proj": "row"}
VOCABULARY: Plan = {"model.embed_tokens": "vocab", "lm_head": "vocab"}
WHOLE: Plan = ATTENTION | MLP | VOCABULARY
HEAD_NORMS: Plan = {"*.self_attn.[qk]_norm": "partial"}
ADAM = OptimizerConfig(lr=0.01, eps=1e-3, clip_norm=0.5)  # a small eps would make a whole step of a gradient's rounding


@dataclass(frozen=True)
class Case:
    """A family of transformers, or "own", its options and a plan."""

    family: str
    plan: Plan
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "llama": Case("Llama", WHOLE),
    "llama-tied-biases-257-padding": Case(
        "Llama",
        WHOLE,
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "vocab_size": 257,
            "num_key_value_heads": 8,
            "pad_token_id": int(random_batch(257)[0][0, 0]),  # one that is there
        },
    ),
    "qwen2": Case("Qwen2", WHOLE),
    "mistral": Case("Mistral", WHOLE, {"sliding_window": 3}),
    "qwen3": Case("Qwen3", WHOLE | HEAD_NORMS, {"head_dim": 6}),
    "llama-mlps": Case("Llama", MLP),
    "llama-layer-0": Case("Llama", {f"model.layers.0.{key[2:]}": style for key, style in (ATTENTION | MLP).items()}),
    "own": Case("own", {"embedding": "vocab", "blocks.*.up": "column", "blocks.*.down": "row", "head": "vocab"}),
}


class Block(nn.Module):
    """What people write."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.down = nn.Linear(4 * dim, dim)
        self.up = nn.Linear(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Own(nn.Module):
    """A model with a block that is there twice, a head with a bias, and a frozen layer; answers as transformers do."""

    def __init__(self, vocab_size: int = 101, dim: int = 16):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        first, second = Block(dim), Block(dim)
        self.blocks = nn.ModuleList([first, second, first])
        self.head = nn.Linear(dim, vocab_size)
        second.up.requires_grad_(False)

    def forward(self, tokens: Tensor, labels: Tensor | None = None, shift_labels: Tensor | None = None) -> Any:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Answer(logits, loss)


@dataclass
class Answer:
    """As a transformers model's."""

    logits: Tensor
    loss: Tensor | None


def make(case: Case, dtype: torch.dtype = torch.float64) -> Any:
    """The model as it was, the same in every process."""
    torch.manual_seed(0)
    if case.family == "own":
        model: Any = Own()
    else:
        import transformers  # here, since most ranks of most tests have no use for it

        sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 32}
        tokens = {"bos_token_id": None, "eos_token_id": None}
        options: dict[str, Any] = sizes | tokens | {"tie_word_embeddings": False} | case.options
        config = getattr(transformers, f"{case.family}Config")(**options, attn_implementation="sdpa")
        model = getattr(transformers, f"{case.family}ForCausalLM")(config)
    randomise(model)
    return in_double(model) if dtype == torch.float64 else model.to(dtype)


def vocab_of(model: Any) -> int:
    """How many tokens it knows."""
    return model.head.out_features if isinstance(model, Own) else model.config.vocab_size


def measure_whole(case: Case, dtype: torch.dtype) -> Measured:
    """Of the unsplit model: logits, loss, every gradient, and the weights after a step of torch's AdamW."""
    model = make(case, dtype)
    found = {name: x.copy() for name, x in measure_oracle(model, _trained, vocab_of(model)).items()}
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    norm = torch.cat([p.grad.flatten() for p in named.values()]).norm()
    assert norm > ADAM.clip_norm  # otherwise nothing is proven of it
    for p in named.values():
        p.grad *= ADAM.clip_norm / norm  # torch's own clipping adds 1e-6 to the norm
    decayed = [p for p in named.values() if p.dim() > 1]
    others = [p for p in named.values() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": ADAM.weight_decay}, {"params": others, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=ADAM.lr, betas=ADAM.betas, eps=ADAM.eps).step()
    after = {f"after {name}": p.detach().numpy() for name, p in model.named_parameters()}
    return found | after


def measure_split(case: Case, layout: Layout, dtype: torch.dtype) -> Measured:
    """The same of the split model, on a rank; replicas by tpformer's buckets."""
    mesh = layout.mesh()
    model = make(case, dtype)
    names = [name for name, _ in model.named_parameters()]
    tpformer.parallelize(model, case.plan, mesh)
    assert [name for name, _ in model.named_parameters()] == names
    if mesh.dp.size > 1:
        return _measure_replica(model, mesh)

    def gradients(state: dict[str, Tensor]) -> dict[str, Tensor]:
        tpformer.reduce_partial_gradients(model)
        return {name: tpformer.full_gradient(model, name) for name in _trained(state)}

    found = measure_oracle(model, gradients, vocab_of(model))
    local = _trained({name: p.grad for name, p in model.named_parameters()})
    return found | _step(model, mesh, local)


def _measure_replica(model: Any, mesh: Mesh) -> Measured:
    """Of half of the batch on each replica: the gradients of the whole batch, and the weights after a step."""
    tokens, targets = (x.chunk(mesh.dp.size)[mesh.dp.rank] for x in random_batch(vocab_of(model)))
    buckets = GradientBuckets(model, mesh)
    buckets.start(last=True)
    loss = F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten()) / mesh.dp.size
    loss.backward()
    found = buckets.finish()
    known = tpformer.placements(model, mesh)
    whole = {name: tpformer.placement.gather_full(x, known[name], mesh.tp).numpy() for name, x in found.items()}
    return whole | _step(model, mesh, found)


def _step(model: Any, mesh: Mesh, gradients: dict[str, Tensor]) -> Measured:
    Optimizer(model, mesh, ADAM).step(gradients, ADAM.lr, torch.zeros(()))
    whole = partial(tpformer.full_parameter, model)
    return {f"after {name}": whole(name).numpy() for name, _ in model.named_parameters()}


def _trained(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: x for name, x in state.items() if x is not None}
