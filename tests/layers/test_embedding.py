"""Embedding, position table and head against torch.nn at any layout, with vocabularies that do not divide."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed import Ranks
from tests.layers.prove import Results, evaluate, fill, gradient, meshes, noise, on_layouts, prove, take
from tpformer import Axis, Mesh, PositionEmbedding, VocabParallelEmbedding, VocabParallelHead, trace_communication
from tpformer.layers.embedding import padded_vocab

B, S, D = 2, 8, 6
# at tp 4: rank 3 has 5 of its 32 rows; ranks 2 and 3 have none; nothing is padding
VOCABULARIES = [101, 60, 128]


def tokens_of(vocab_size: int) -> Tensor:
    """Every region of the vocabulary, both ends of it, and repetitions."""
    tokens = torch.randint(vocab_size, (B, S), generator=torch.Generator().manual_seed(1))
    tokens[0, :4] = torch.tensor([0, vocab_size - 1, 31, 32])
    tokens[1, 5:] = vocab_size - 1
    return tokens


def build(kind: str, size: int, mesh: Mesh, dtype: torch.dtype) -> nn.Module:
    """The layer with values that depend on the name of its parameter only."""
    layer: nn.Module
    if kind == "head":
        layer = VocabParallelHead(D, size, mesh=mesh)
    else:
        layer = (VocabParallelEmbedding if kind == "embedding" else PositionEmbedding)(size, D, mesh=mesh)
    fill(layer.to(dtype), mesh)
    return layer


class AsLayer(nn.Module):
    """The embedding as a layer of a float tensor that it adds nothing but zeros of, to be evaluated like the others."""

    def __init__(self, embedding: nn.Module, tokens: Tensor):
        super().__init__()
        self.embedding, self.tokens = embedding, tokens

    def forward(self, x: Tensor) -> Tensor:
        return x + self.embedding(self.tokens)


def run_embedding(vocab_size: int) -> Results:
    def case(mesh: Mesh, dtype: torch.dtype) -> dict[str, Tensor]:
        layer = AsLayer(build("embedding", vocab_size, mesh, dtype), tokens_of(vocab_size))
        return evaluate(layer, noise("x", B, S, D).to(dtype), noise("dy", B, S, D).to(dtype), mesh)

    return on_layouts(case)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_embedding_is_torch_nn_embedding(ranks: Ranks, vocab_size: int) -> None:
    embedding = nn.Embedding(vocab_size, D).double()
    fill(embedding, Mesh())
    y = embedding(tokens_of(vocab_size))
    dy = noise("dy", B, S, D)
    y.backward(dy)
    expected = {"y": y + noise("x", B, S, D), "dx": dy, "embedding.weight": gradient(embedding.weight)}
    prove(ranks, run_embedding, expected, vocab_size)


def run_position() -> Results:
    def case(mesh: Mesh, dtype: torch.dtype) -> dict[str, Tensor]:
        x, dy = noise("x", B, S, D).to(dtype), noise("dy", B, S, D).to(dtype)
        return evaluate(build("position", 11, mesh, dtype), x, dy, mesh)

    return on_layouts(case)


def test_position_embedding_adds_the_rows_of_the_global_positions(ranks: Ranks) -> None:
    table = nn.Embedding(11, D).double()
    fill(table, Mesh())
    x, dy = noise("x", B, S, D), noise("dy", B, S, D)
    y = x + table(torch.arange(S))
    y.backward(dy)
    prove(ranks, run_position, {"y": y, "dx": dy, "weight": gradient(table.weight)})


def test_positions_beyond_the_table_are_refused() -> None:
    for rows in (1, 5):
        with pytest.raises((ValueError, RuntimeError)):
            PositionEmbedding(rows, D)(torch.zeros(B, S, D))


def run_head(vocab_size: int) -> Results:
    def case(mesh: Mesh, dtype: torch.dtype) -> dict[str, Tensor]:
        x, dy = noise("x", B, S, D).to(dtype), noise("dy", B, S, 128).to(dtype)
        return evaluate(build("head", vocab_size, mesh, dtype), x, dy, mesh, kinds=("tokens", "features"))

    return on_layouts(case)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_head_is_a_linear_layer_with_zero_rows_of_padding(ranks: Ranks, vocab_size: int) -> None:
    linear = nn.Linear(D, vocab_size, bias=False).double()
    fill(linear, Mesh())
    x, dy = noise("x", B, S, D).requires_grad_(), noise("dy", B, S, 128)
    y = linear(x)
    y.backward(dy[..., :vocab_size])
    padded = F.pad(y, (0, 128 - vocab_size))
    prove(ranks, run_head, {"y": padded, "dx": gradient(x), "weight": gradient(linear.weight)}, vocab_size)


def run_padding(vocab_size: int) -> list[float]:
    """Rows of padding on this rank, and the largest number in them: initial weight, loaded weight, gradient."""
    mesh = meshes()["tp 4"]
    layer = VocabParallelEmbedding(vocab_size, D, mesh=mesh)
    real = min(max(vocab_size - 32 * mesh.tp.rank, 0), 32)
    initial = layer.weight.detach()[real:].clone()
    torch.nn.init.ones_(layer.weight)  # loading whole weights must make it zero again
    fill(layer, mesh)
    layer(tokens_of(vocab_size)).backward(noise("dy", B, S, D).float())
    rows = torch.cat([initial, layer.weight.detach()[real:], gradient(layer.weight)[real:]])
    return [len(rows) / 3, rows.abs().max().item() if len(rows) else 0.0]


@pytest.mark.parametrize(("vocab_size", "rows"), [(101, [0, 0, 0, 27]), (60, [0, 4, 32, 32]), (128, [0] * 4)])
def test_padding_rows_are_zero_and_get_no_gradient(ranks: Ranks, vocab_size: int, rows: list[int]) -> None:
    assert ranks(run_padding, 4, vocab_size) == [[n, 0.0] for n in rows]


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("wrong", [-1, 101, 127, 10**6])
def test_a_token_outside_the_vocabulary_is_named(tp: int, wrong: int) -> None:
    layer = VocabParallelEmbedding(101, D, mesh=Mesh(tp=Axis("tp", tp)))
    with pytest.raises(ValueError, match=rf"token {wrong} must be in 0..100 \(vocab_size 101\)"):
        layer(torch.tensor([[5, wrong, 100]]))


def test_vocabularies_are_padded_alike_at_any_tp() -> None:
    assert [padded_vocab(v, tp) for v in (1, 101, 128, 129, 50257) for tp in (1, 2, 4)] == (
        [128] * 3 + [128] * 3 + [128] * 3 + [256] * 3 + [50304] * 3
    )


@pytest.mark.parametrize(
    "make", [lambda mesh: VocabParallelEmbedding(101, D, mesh=mesh), lambda mesh: VocabParallelHead(D, 101, mesh=mesh)]
)
def test_a_vocabulary_that_tp_does_not_divide_is_named(make: Callable[[Mesh], object]) -> None:
    with pytest.raises(ValueError, match=r"padded vocabulary \(128, for 101\) must be divisible by tp \(3\)"):
        make(Mesh(tp=Axis("tp", 3)))


COUNTS = {
    "embedding": (["forward all_reduce"], ["forward reduce_scatter", "backward all_gather"]),
    "position": ([], []),
    "head": (["backward all_reduce"], ["forward all_gather", "backward all_gather", "backward reduce_scatter"]),
}


def run_counts(kind: str) -> dict[str, list[str]]:
    counts = {}
    for layout, mesh in meshes().items():
        layer = build(kind, 101, mesh, torch.float32)
        x = take(noise("x", B, S, D).float(), "tokens", mesh).requires_grad_()
        with trace_communication() as trace:
            y = layer(tokens_of(101) if kind == "embedding" else x)
            y.backward(torch.ones_like(y))
        counts[layout] = [f"{call.phase} {call.op}" for call in trace.calls]
    return counts


@pytest.mark.parametrize("kind", COUNTS)
def test_communicates_once_each_way(ranks: Ranks, kind: str) -> None:
    assert set(map(tuple, run_counts(kind).values())) == {()}
    for counts in ranks(run_counts, 4, kind):
        for layout, calls in counts.items():
            assert calls == COUNTS[kind]["sequence" in layout], layout


def run_strided() -> list[float]:
    """Errors of output and weight gradient for tokens and gradients that are stored the other way round."""
    errors = []
    for mesh in meshes().values():
        results = []
        for strided in (False, True):
            layer = build("embedding", 101, mesh, torch.float64)
            tokens, dy = tokens_of(101), take(noise("dy", B, S, D), "tokens", mesh)
            if strided:
                tokens, dy = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (tokens, dy))
            y = layer(tokens)
            y.backward(dy)
            results.append((y.detach(), layer.weight.grad))
        errors += [float((a - b).abs().max()) for a, b in zip(*results, strict=True)]
    return errors


def test_strided_tokens_and_gradients(ranks: Ranks) -> None:
    for errors in [run_strided(), *ranks(run_strided, 4)]:
        assert max(errors) < 1e-14
