"""What backward keeps of a forward, and what comes and goes beside it: terms of one block and of one micro-batch.

Read off the layers: what their autograd Functions save (each storage once, however many views of it are saved), and
what lives at the few moments of a step at which most can be alive. Dropout counts as 0.
Source of the count by hand: arXiv 2205.05198, section 4 (34 sbh bytes a block, of which 5as²/h are never stored here).
"""

from functools import lru_cache
from typing import NamedTuple

from tpformer.layers.embedding import padded_vocab
from tpformer.layers.linear_cross_entropy import LEAST_CHUNK
from tpformer.planner.sizes import Sizes
from tpformer.planner.terms import Term, term

Terms = tuple[Term, ...]
QKV = "(heads + 2 kv_heads)/tp x head_dim"
CPU_CHUNK = 1 << 20
"""Bytes of fp32 that the loss's reference works on at a time, on a CPU."""


class Step(NamedTuple):
    """A moment of a block's backward: which of its saved tensors are there, and what comes and goes."""

    name: str
    saved: Terms
    transient: Terms
    waiting: Terms
    """What the weights' gradients need that are put off (zero bubble), beside those two."""
    weights: int
    """Of the block's weights (down, gate and up, out, qkv), how many have their gradient."""
    first: int
    """The first storage that it asks for, by its place in Block.order."""
    own: int
    """How many it asks for."""


class Block(NamedTuple):
    """One block and one micro-batch."""

    saved: Terms
    """All that backward keeps, but its input."""
    kept: Terms
    """That where it is to be recomputed: less."""
    steps: tuple[Step, ...]
    """Of the backward of one that keeps all."""
    steps_again: tuple[Step, ...]
    """Of one that is recomputed."""
    waiting: Terms
    """What all its weights' gradients need, once backward is through."""
    order: Terms
    """What it saves, one storage after another, as backward asks for them; the norms' statistics are left out."""


@lru_cache(maxsize=4096)
def block(z: Sizes, recompute: str, modules: tuple[str, ...]) -> Block:
    """What a block saves, and the moments of its backward; modules: those that selective recomputation runs again."""
    attention, norms, mlp = _attention(z), _norms(z), _mlp(z)
    saved: Terms = (*norms, *attention, *mlp)
    steps = _steps(z, norms, attention, attention, mlp)
    again, kept = steps, saved
    if recompute == "full":
        kept = ()
    elif recompute == "selective":
        inner = attention if "attention.core" not in modules else _attention_but_core(z)
        inner = () if "attention" in modules else inner
        kept = (*norms, *inner, *(() if "mlp" in modules else mlp))
        both = (*attention, *(one for one in inner if one not in attention))
        again = _steps(z, norms, inner, both, mlp)
    return Block(saved, kept, steps, again, _waiting(z), _order(z, attention, mlp))


def _norms(z: Sizes) -> Terms:
    """What the two norms give to the matmuls, the residual sum between them, and a row's statistics."""
    statistics = (2 if z.gpt else 1) * 2
    length = ("s/tp", z.s // z.tp) if z.gathers else ("s", z.s)
    return (
        z.local("norm outputs", 2),
        z.local("residual stream after attention", width=z.stream),
        term("norm statistics", ("tensors", statistics), ("b", z.b), length, ("bytes", 4)),
    )


def _attention(z: Sizes) -> Terms:
    """q, k, v, the output and its log-sum-exp, as flash attention keeps them; views keep the whole projection."""
    a = z.model.attention
    q, kv = z.heads * a.head_dim, z.kv_heads * a.head_dim
    output = z.whole("attention output", "heads/tp x head_dim", q)
    lse = z.whole("attention log-sum-exp", "heads/tp", z.heads, width=4)
    packed = z.whole("q|k|v projection", QKV, q + 2 * kv)
    if z.gpt:
        return packed, output, lse, *_mask(z)
    found = [z.whole("rotated queries", "heads/tp x head_dim", q)]
    if z.expands:
        found.append(z.whole("keys and values, repeated for each head", "heads/tp x head_dim", q, 2))
    else:
        found.append(z.whole("rotated keys", "kv_heads/tp x head_dim", kv))
    if a.qk_norm or not z.expands:
        found.append(packed)
    if a.qk_norm:
        found.append(z.whole("q and k norms' statistics", "(heads + kv_heads)/tp", z.heads + z.kv_heads, width=4))
        if z.kv_heads not in (1, z.heads):  # else the queries lie together
            found.append(z.whole("queries before their norm", "heads/tp x head_dim", q))
    return (*found, output, lse, *_mask(z))


def _attention_but_core(z: Sizes) -> Terms:
    """That without what the core alone keeps: its inputs stay, and its output, which the projection keeps."""
    a = z.model.attention
    inside = ("attention log-sum-exp", "attention mask", "keys and values, repeated for each head")
    found = tuple(one for one in _attention(z) if one.name not in inside)
    if not z.expands:
        return found
    kv = z.kv_heads * a.head_dim
    found += (z.whole("rotated keys", "kv_heads/tp x head_dim", kv),)
    if a.qk_norm:
        return found
    packed = z.whole("q|k|v projection", QKV, z.heads * a.head_dim + 2 * kv)
    return (*found, packed)


def _mask(z: Sizes) -> Terms:
    """Of a window that leaves something out, on a CPU; CUDA has a kernel without one."""
    window = z.model.attention.sliding_window
    if not z.on_cpu or window is None or window >= z.s:
        return ()
    return (term("attention mask", ("s", z.s), ("s", z.s), ("bytes", z.width)),)


def _mlp(z: Sizes) -> Terms:
    """The activation's inputs, and its output, which the second matmul reads."""
    relu = z.gpt and z.model.activation == "relu"  # keeps its output only
    return (z.whole("MLP activations", "ffn/tp", z.ffn, 1 if relu else 2 if z.gpt else 3),)


def _steps(z: Sizes, norms: Terms, before: Terms, attention: Terms, mlp: Terms) -> tuple[Step, ...]:
    """The moments of backward, in order; before: what attention has saved as long as it is not recomputed."""
    d, a = z.model.hidden_size, z.model.attention
    q, kv = z.heads * a.head_dim, z.kv_heads * a.head_dim
    inner = 1 if z.gpt else 2  # what the first matmul of an MLP gives
    n, m = len(_singles(mlp)), len(_singles(attention))
    normed = (z.local("first norm's output"),)
    incoming = z.local("gradient of the residual stream", width=z.stream)
    copies = 1 if z.b == 1 else 2  # of several samples a gathered sequence is put together once more
    dy = (z.whole("gathered gradient", "d", d, copies),) if z.gathers else ()
    gathered = (z.whole("gathered sequence, and sums to be scattered", "d", d, 2 * copies - 1),) if z.gathers else ()
    products = 2 if z.on_cpu and not z.gpt else 1  # gate's and up's apart
    entered = (z.whole("input gradient of a column-parallel layer", "d", d, products), *gathered)
    # the activation's output is no longer there, but relu's, which is all that it keeps
    left = _singles(mlp)[1:] if n > 1 else mlp
    times = 2 if z.gpt else 4 if z.on_cpu else 3
    waits = _waiting(z)
    packed = z.whole("gradient of q|k|v", QKV, q + 2 * kv)
    steps = [
        Step("the MLP's second matmul", (*norms, *before, *mlp), (incoming, *dy, _ffn(z, 1)), (), 1, 0, 1),
        Step("the MLP's activation", (*norms, *before, *left), (incoming, _ffn(z, times)), waits[:1], 1, n > 1, inner),
        Step("the MLP's first matmul", (*norms, *before), (incoming, _ffn(z, inner), *entered), waits[:1], 2, n, 1),
        Step("attention", (*normed, *attention), (incoming, *_core(z, q, kv)), waits[:2], 3, n + 2, m),
    ]
    if z.gpt:
        views = packed.times(("views", 3)), z.whole("gradient of queries", "heads/tp x head_dim", q)
        steps.append(Step("q, k and v put together", normed, (incoming, *views), waits[:3], 3, n + 2 + m, 0))
    entering = incoming, packed, z.whole("input gradient of a column-parallel layer", "d", d), *gathered
    steps.append(Step("the q|k|v projection", normed, entering, waits[:3], 4, n + 2 + m, 1))
    return tuple(steps)


def _order(z: Sizes, attention: Terms, mlp: Terms) -> Terms:
    """A block's storages, last first."""
    normed, residual = z.local("a norm's output"), z.local("residual stream after attention", width=z.stream)
    return (*_singles(mlp), normed, residual, *_singles(attention), normed)


def _singles(terms: Terms) -> Terms:
    """Tensors one by one."""
    found: list[Term] = []
    for one in terms:
        count = dict(one.factors).get("tensors", 1)
        factors = tuple(factor for factor in one.factors if factor[0] != "tensors")
        found += [Term(one.name, one.bytes // count, factors)] * count
    return tuple(found)


def _ffn(z: Sizes, count: int) -> Term:
    return z.whole("gradients inside the MLP", "ffn/tp", z.ffn, count)


def _core(z: Sizes, q: int, kv: int) -> Terms:
    """Attention's own backward: of the output, queries, keys and values, these for each query head at first."""
    a = z.model.attention
    repeated = q if a.num_kv_heads != a.num_heads else kv
    found = (
        z.whole("gradients of queries and of the output", "heads/tp x head_dim", q, 2),
        z.whole("gradients of keys and values", "heads/tp x head_dim", repeated, 2),
    )
    if z.on_cpu:
        return found
    return (*found, z.whole("fp32 sum of the queries' gradient", "heads/tp x head_dim", q, width=4))


def _waiting(z: Sizes) -> Terms:
    """The factors of the weights' gradients, each weight's input and its output's gradient: down, up, out, qkv."""
    d, a = z.model.hidden_size, z.model.attention
    q, kv = z.heads * a.head_dim, z.kv_heads * a.head_dim
    inner = 1 if z.gpt else 2
    return (
        z.whole("inputs of the MLP's second matmul", "ffn/tp", z.ffn),
        z.whole("factors of the MLP's gradients", "(d + d + inner ffn/tp)", 2 * d + inner * z.ffn),
        z.whole("inputs of the attention output", "heads/tp x head_dim", q),
        z.whole("factors of the other gradients", "(2 d + (heads + 2 kv_heads)/tp x head_dim)", 2 * d + q + 2 * kv),
    )


class Ends(NamedTuple):
    """What a micro-batch takes beside the blocks."""

    embedding: Terms
    """Kept for its backward."""
    rotations: Terms
    """cos and sin of every position, which every block of a forward shares."""
    softmax: Terms
    """While the loss's gradient is computed, in forward."""
    products: Terms
    """While the head's is."""
    saved: Terms
    """What the loss keeps: gradients."""
    norm: Terms
    """While the final norm's gradient is computed."""
    head: Terms
    """The head's gradient, where it waits for that of the embedding, or for the other ends'."""


@lru_cache(maxsize=4096)
def ends(z: Sizes) -> Ends:
    """What the first and the last stage take beside their blocks."""
    d, n = z.model.hidden_size, z.b * z.s
    v = padded_vocab(z.model.vocab_size, z.tp) // z.tp
    tokens = min(n, max(1, max(LEAST_CHUNK, v * d * z.width) // (v * z.width)))
    chunked = tokens < n
    wide = chunked or z.scaled  # then the head's gradient is there from the first chunk on, in fp32
    weight = ("vocabulary/tp", v), ("d", d)
    head = term("head's gradient", *weight, ("bytes", 4 if wide else z.width))
    states = z.whole("gradient of the head's input", "d", d)
    inputs = (z.local("head's input"), *((z.whole("head's input, gathered", "d", d),) if z.gathers else ()))
    chunks = ("chunks", 2 if z.tp > 1 and chunked else 1), ("tokens", tokens), ("vocabulary/tp", v), ("bytes", z.width)
    numbers = term("numbers a token", ("tokens", n), ("numbers", 13), ("bytes", 4))
    loss = (*inputs, term("logits", *chunks), states, numbers)
    embedded = (z.whole("tokens", "ids", 1, width=8),)
    elsewhere = (z.whole("tokens elsewhere", "flags", 1, width=1),) if z.tp > 1 else ()
    head_dim = ("head_dim", z.model.attention.head_dim)
    return Ends(
        embedding=embedded + elsewhere,
        rotations=() if z.gpt else (term("rotary table", ("s", z.s), head_dim, ("bytes", 4)),),
        softmax=(*loss, *_softmax(z, tokens, v), *((head,) if wide else ())),
        products=(*loss, head),
        saved=(states, head),
        norm=(states, head, _final_norm(z)),
        head=(term("head's gradient", *weight, ("bytes", z.width)),),
    )


def _softmax(z: Sizes, tokens: int, v: int) -> Terms:
    """On a CPU: some tokens' numbers, widened, and their exponentials; of several parts the last one's stay as long."""
    if not z.on_cpu:
        return ()
    some = min(tokens, max(1, CPU_CHUNK // (4 * v)))
    copies = (1 if z.width == 4 else 2) + (some < tokens)
    return (term("softmax", ("tensors", copies), ("tokens", some), ("vocabulary/tp", v), ("bytes", 4)),)


def _final_norm(z: Sizes) -> Term:
    """Gradients of its output and input; on a CPU in fp32, and with what its backward widens or multiplies."""
    if not z.on_cpu:
        return z.local("gradients inside the final norm", 2, width=z.stream)
    return z.local("gradients inside the final norm", (2 if z.gpt else 3) + (0 if z.width == 4 else 2), width=4)
