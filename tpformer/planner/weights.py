"""How many parameters a rank has, in closed form: the shapes that the layers give them, without building any."""

from functools import lru_cache
from typing import NamedTuple

from tpformer.layers.embedding import padded_vocab
from tpformer.models.decoder import Part
from tpformer.models.gpt import GPTConfig
from tpformer.planner.candidate import ModelConfig


class Weight(NamedTuple):
    """A parameter, or several of one shape, as one tp rank has it; a vector has one column."""

    name: str
    rows: int
    columns: int = 1
    times: int = 1

    def numbers(self, shards: int = 1) -> int:
        """Numbers on the replica that has most, where `shards` of them share out the rows (as torch.chunk does)."""
        return -(-self.rows // shards) * self.columns * self.times


@lru_cache(maxsize=4096)
def block_weights(model: ModelConfig, tp: int) -> tuple[Weight, ...]:
    """The parameters of a block, by name below it; every tp rank has as many."""
    a, d = model.attention, model.hidden_size
    heads, kv_heads = a.num_heads // tp, max(1, a.num_kv_heads // tp)  # beyond tp, a copy of one
    qkv = (heads + 2 * kv_heads) * a.head_dim
    gpt = isinstance(model, GPTConfig)
    ffn = (model.ffn_size if isinstance(model, GPTConfig) else 2 * model.ffn_hidden_size) // tp
    found = [
        Weight("attention_norm, mlp_norm", d, times=4 if gpt else 2),
        Weight("attention.qkv.weight", qkv, d),
        Weight("attention.out.weight", d, heads * a.head_dim),
        Weight("mlp.up.weight" if gpt else "mlp.gate_up.weight", ffn, d),
        Weight("mlp.down.weight", d, ffn if gpt else ffn // 2),
    ]
    if a.qkv_bias:
        found.append(Weight("attention.qkv.bias", qkv))
    if a.out_bias:
        found.append(Weight("attention.out.bias", d))
    if a.qk_norm:
        found.append(Weight("attention.q_norm, k_norm", a.head_dim, times=2))
    if gpt:
        found += [Weight("mlp.up.bias", ffn), Weight("mlp.down.bias", d)]
    return tuple(found)


@lru_cache(maxsize=4096)
def end_weights(model: ModelConfig, tp: int, first: bool, last: bool) -> tuple[Weight, ...]:
    """The parameters beside the blocks, of a part that has the first stage, the last one, both or neither."""
    d, gpt, tied = model.hidden_size, isinstance(model, GPTConfig), model.tie_embeddings
    vocabulary = padded_vocab(model.vocab_size, tp) // tp
    found = []
    if first or (last and tied):
        found.append(Weight("embedding.weight", vocabulary, d))
    if first and gpt:
        found.append(Weight("position.weight", model.max_seq_len, d))
    if last:
        found.append(Weight("norm", d, times=2 if gpt else 1))
    if last and not tied:
        found.append(Weight("head.weight", vocabulary, d))
    return tuple(found)


def part_weights(model: ModelConfig, tp: int, part: Part) -> tuple[Weight, ...]:
    """All parameters of a part of a model."""
    blocks = (w._replace(name=f"blocks.{w.name}", times=w.times * len(part.layers)) for w in block_weights(model, tp))
    return (*blocks, *end_weights(model, tp, part.first, part.last))


def numbers(weights: tuple[Weight, ...], shards: int = 1) -> int:
    """Numbers of all of them on the replica that has most."""
    return sum(weight.numbers(shards) for weight in weights)
