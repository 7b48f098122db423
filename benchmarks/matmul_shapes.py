"""The matmuls of known models on one rank, for the table by which `auto` chooses: from their sizes, not from a list."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

TENSOR_PARALLEL = (1, 2, 4, 8)
TOKENS = (4096, 8192)
"""Of a micro-batch; the table rounds up to a power of two."""


class Model(NamedTuple):
    """What a model's matmuls depend on."""

    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    llama: bool
    """Gated and without biases; else GELU, with biases."""
    vocab: int = 0
    """Of the matmul at the end; 0 leaves it out."""


class Shape(NamedTuple):
    """One row: a (m, k) times b (k, n)."""

    kind: str
    m: int
    n: int
    k: int


class Linear(NamedTuple):
    """A layer's part on one rank, x (tokens, inputs) -> y (tokens, outputs), and what follows it in the same kernel."""

    outputs: int
    inputs: int
    epilogue: str


MODELS = (
    Model("llama3-8b", 4096, 14336, 32, 8, 128, llama=True, vocab=128256),
    Model("llama3-70b", 8192, 28672, 64, 8, 128, llama=True, vocab=128256),
    # weak scaling of arXiv 1909.08053, table 1
    *(
        Model(f"gpt-{heads * 96}", heads * 96, 4 * heads * 96, heads, heads, 96, llama=False)
        for heads in (16, 20, 24, 32)
    ),
)


def linears(model: Model, tp: int) -> Iterator[Linear]:
    """One layer's on a rank, and the head; after a sum over ranks nothing can be fused."""
    fused = (
        {"qkv": "plain", "row": "plain", "up": "gated"}
        if model.llama
        else {"qkv": "bias", "row": "plain", "up": "gelu"}
    )
    row = "residual" if tp == 1 else fused["row"]
    heads, ffn = model.heads * model.head_dim // tp, model.ffn // tp
    yield Linear(heads + 2 * model.kv_heads * model.head_dim // tp, model.hidden, fused["qkv"])
    yield Linear(model.hidden, heads, row)
    yield Linear(2 * ffn if model.llama else ffn, model.hidden, fused["up"])
    yield Linear(model.hidden, ffn, row)
    if model.vocab:
        yield Linear(model.vocab // tp, model.hidden, "plain")


def matmuls(linear: Linear, tokens: int) -> Iterator[Shape]:
    """Forward with and without its epilogue, the input's gradient, the weight's, and the weight's added in fp32."""
    outputs, inputs, epilogue = linear
    yield Shape(f"nt {epilogue}", tokens, outputs, inputs)
    yield Shape("nt plain", tokens, outputs, inputs)
    yield Shape("nn plain", tokens, inputs, outputs)
    yield Shape("tn plain", outputs, inputs, tokens)
    yield Shape("tn accumulate", outputs, inputs, tokens)


def shapes(models: Iterable[Model] = MODELS, tokens: Iterable[int] = TOKENS) -> list[Shape]:
    """Every row of the table, once; a tp that does not divide the heads is none."""
    found = (
        shape
        for model in models
        for tp in TENSOR_PARALLEL
        if model.heads % tp == 0 and model.kv_heads % tp == 0
        for count in tokens
        for linear in linears(model, tp)
        for shape in matmuls(linear, count)
    )
    return list(dict.fromkeys(found))
