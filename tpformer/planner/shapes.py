"""The tp-local shape of every parameter, in closed form, in the order in which the models register them."""

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from types import MappingProxyType

from tpformer.layers.embedding import padded_vocab
from tpformer.models.gpt import GPTConfig
from tpformer.planner.candidate import ModelConfig

Shapes = MappingProxyType[str, tuple[int, ...]]
"""Parameters by name, those of a block as below the block."""


@dataclass(frozen=True)
class Copied:
    """Rows of a parameter that several tp ranks hold, each with a part of their gradient only."""

    name: str
    length: int
    """Rows of the tp-local tensor."""
    start: int
    """The first of those that are copies."""
    rows: int
    """How many are."""
    width: int
    """Numbers of a row."""
    different: int
    """How many ranks hold other rows than their peers: 1 if all hold the same."""


@lru_cache(maxsize=1024)
def block_shapes(model: ModelConfig, tp: int) -> Shapes:
    """Of one block, whose sizes tp divides."""
    gpt, a, d = isinstance(model, GPTConfig), model.attention, model.hidden_size
    ffn = model.ffn_size if isinstance(model, GPTConfig) else model.ffn_hidden_size
    heads = a.num_heads // tp * a.head_dim
    qkv = heads + 2 * max(1, a.num_kv_heads // tp) * a.head_dim
    shapes: dict[str, tuple[int, ...]] = {"attention_norm.weight": (d,)}
    if gpt:
        shapes["attention_norm.bias"] = (d,)
    shapes["attention.qkv.weight"] = (qkv, d)
    if a.qkv_bias:
        shapes["attention.qkv.bias"] = (qkv,)
    shapes["attention.out.weight"] = (d, heads)
    if a.out_bias:
        shapes["attention.out.bias"] = (d,)
    if a.qk_norm:
        shapes |= {"attention.q_norm.weight": (a.head_dim,), "attention.k_norm.weight": (a.head_dim,)}
    shapes["mlp_norm.weight"] = (d,)
    if gpt:
        shapes |= {"mlp_norm.bias": (d,), "mlp.up.weight": (ffn // tp, d), "mlp.up.bias": (ffn // tp,)}
        shapes |= {"mlp.down.weight": (d, ffn // tp), "mlp.down.bias": (d,)}
    else:
        shapes |= {"mlp.gate_up.weight": (2 * ffn // tp, d), "mlp.down.weight": (d, ffn // tp)}
    return MappingProxyType(shapes)


@lru_cache(maxsize=1024)
def end_shapes(model: ModelConfig, tp: int, first: bool, last: bool) -> tuple[Shapes, Shapes]:
    """Of what comes before the blocks and of what comes after them, on a process that has the first, the last stage.

    Raises ValueError for a vocabulary that tp does not divide.
    """
    d, vocabulary = model.hidden_size, padded_vocab(model.vocab_size, tp) // tp
    before: dict[str, tuple[int, ...]] = {}
    after: dict[str, tuple[int, ...]] = {}
    if first or (last and model.tie_embeddings):  # a tied head has a copy of the embedding where that is not
        before["embedding.weight"] = (vocabulary, d)
    if first and isinstance(model, GPTConfig):
        before["position.weight"] = (model.max_seq_len, d)
    if last:
        after["norm.weight"] = (d,)
        if isinstance(model, GPTConfig):
            after["norm.bias"] = (d,)
        if not model.tie_embeddings:
            after["head.weight"] = (vocabulary, d)
    return MappingProxyType(before), MappingProxyType(after)


def count(shapes: Shapes) -> int:
    """Parameters of them all."""
    return sum(map(prod, shapes.values()))


@lru_cache(maxsize=1024)
def block_copies(model: ModelConfig, tp: int, sequence_parallel: bool) -> tuple[Copied, ...]:
    """Of one block: what `placement.sum_partial` sums over tp; none where tp is 1."""
    a, found = model.attention, []
    for name, shape in block_shapes(model, tp).items() if tp > 1 else ():
        if ".qkv." in name:
            if a.num_kv_heads < tp:  # the key and value rows, which come after the queries'
                rows = 2 * a.head_dim
                found.append(Copied(name, shape[0], shape[0] - rows, rows, prod(shape[1:]), a.num_kv_heads))
        elif "q_norm" in name or "k_norm" in name or (sequence_parallel and len(shape) == 1 and ".up." not in name):
            found.append(_whole(name, shape))
    return tuple(found)


@lru_cache(maxsize=1024)
def end_copies(model: ModelConfig, tp: int, sequence_parallel: bool, first: bool, last: bool) -> tuple[Copied, ...]:
    """The same of both ends: under sequence parallelism what is no slice of the vocabulary."""
    if tp == 1 or not sequence_parallel:
        return ()
    both = [item for shapes in end_shapes(model, tp, first, last) for item in shapes.items()]
    return tuple(_whole(name, shape) for name, shape in both if name not in ("embedding.weight", "head.weight"))


def _whole(name: str, shape: tuple[int, ...]) -> Copied:
    return Copied(name, shape[0], 0, shape[0], prod(shape[1:]), 1)
