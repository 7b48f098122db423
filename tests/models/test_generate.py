"""Generation: one seed gives the same tokens on any layout; and the options do what they say, at their edges too."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch

from tests.distributed import Ranks
from tests.proofs.cases import Config, Layout, build_random, gpt, llama
from tpformer import GPT, Axis, Llama, Mesh
from tpformer.models.generate import _filter

MODELS: dict[str, Config] = {
    "gpt": gpt(),
    "llama": llama(num_kv_heads=2, vocab_size=257, max_seq_len=12),
    "mistral": llama(num_kv_heads=1, sliding_window=3, max_seq_len=12),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "hot": {"temperature": 1.5, "seed": 1},
    "filtered": {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "seed": 4},
}
NEW = 7  # tokens after a prompt of 7, where no model sees more than 12
Tokens = dict[str, list[list[int]]]


def prompt(length: int = 7, rows: int = 2) -> torch.Tensor:
    """Tokens of every vocabulary here."""
    return torch.randint(101, (rows, length), generator=torch.Generator().manual_seed(0))


def generated(name: str, mesh: Mesh) -> Tokens:
    """What each of OPTIONS gives after a prompt; the window of every model moves on before the end."""
    model = build_random(MODELS[name], mesh, torch.float64)
    return {case: model.generate(prompt(), max_new_tokens=NEW, **options).tolist() for case, options in OPTIONS.items()}


def generated_on(name: str, layout: Layout) -> Tokens:
    """On a rank."""
    return generated(name, layout.mesh())


@lru_cache
def one_process(name: str) -> Tokens:
    """On one process."""
    return generated(name, Mesh())


@lru_cache
def model_of(name: str) -> GPT | Llama:
    """One process's model, fp64."""
    return build_random(MODELS[name], Mesh(), torch.float64)


LAYOUTS = [Layout(2), Layout(2, 1, True), Layout(4), Layout(4, 1, True)]


def test_a_window_that_sequence_parallelism_cannot_split_is_refused() -> None:
    mesh = Mesh(tp=Axis("tp", 2), sequence_parallel=True)
    with pytest.raises(ValueError, match=r"max_seq_len \(9\) must be divisible by tp \(2\)"):
        Llama(llama(max_seq_len=9), mesh).generate(prompt(), max_new_tokens=1)


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name in ("gpt", "llama", "mistral") for layout in LAYOUTS],
    ids=str,
)
def test_one_seed_gives_the_same_tokens_on_any_layout(name: str, layout: Layout, ranks: Ranks) -> None:
    assert ranks(generated_on, layout.world_size, name, layout) == [one_process(name)] * layout.world_size


@pytest.mark.parametrize("name", ["gpt", "llama", "mistral"])
def test_each_option_gives_other_tokens_and_keeps_the_prompt(name: str) -> None:
    found = one_process(name)
    assert len({str(rows) for rows in found.values()}) == len(OPTIONS)
    for rows in found.values():
        assert [row[:7] for row in rows] == prompt().tolist()
        assert {len(row) for row in rows} == {7 + NEW}
        assert all(0 <= token < MODELS[name].vocab_size for row in rows for token in row)


def test_a_single_choice_is_greedy_whatever_the_seed() -> None:
    for name in ("gpt", "llama"):
        greedy = torch.tensor(one_process(name)["greedy"])
        for options in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-9}, {"top_k": 1, "temperature": 9.0}):
            for seed in (0, 1):
                found = model_of(name).generate(prompt(), max_new_tokens=NEW, seed=seed, **options)
                assert torch.equal(found, greedy), (options, seed)


def test_each_step_and_row_draws_its_own_numbers() -> None:
    """So hot that the logits do not matter: what is left is the noise."""
    hot = model_of("gpt").generate(prompt(1, 4), max_new_tokens=20, temperature=1e9)[:, 1:]
    for tokens in (*hot, *hot.T):
        assert len(tokens.unique()) > len(tokens) // 2


def test_limits_beyond_the_vocabulary_filter_nothing() -> None:
    free = model_of("gpt").generate(prompt(), max_new_tokens=6, seed=5)
    for options in ({"top_k": 101}, {"top_k": 10**6}, {"top_p": 1.0}, {"top_k": 101, "top_p": 1.0}):
        found = model_of("gpt").generate(prompt(), max_new_tokens=6, seed=5, **options)
        assert torch.equal(found, free), options


def test_the_filters_keep_exactly_the_likeliest() -> None:
    probabilities = torch.tensor([[0.1, 0.4, 0.15, 0.3, 0.05]], dtype=torch.float64)
    for top_k, top_p, kept in (
        (2, None, [1, 3]),
        (None, 0.39, [1]),
        (None, 0.41, [1, 3]),
        (None, 0.71, [1, 2, 3]),
        (None, 0.96, [0, 1, 2, 3, 4]),
        (3, 0.5, [1, 3]),  # of 0.4, 0.3 and 0.15, which are renormalised to 0.47, 0.35 and 0.18
        (3, 0.46, [1]),
    ):
        found = _filter(probabilities.log(), top_k, top_p).isfinite()[0].nonzero().flatten().tolist()
        assert found == kept, (top_k, top_p)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 2.0}, {"top_k": 5}, {"top_p": 0.6, "temperature": 0.7}], ids=str
)
def test_the_tokens_have_the_frequencies_of_the_distribution(options: dict[str, Any]) -> None:
    """20000 equal prompts: each token as often as its probability says, within five standard errors."""
    n = 20000
    tokens = torch.tensor([[3, 14]])
    logits = model_of("gpt").full_logits(tokens)[:, -1] / options.get("temperature", 1.0)
    expected = _filter(logits, options.get("top_k"), options.get("top_p")).softmax(-1)[0].detach()

    class Repeated(GPT):
        """The same logits for each row, computed once."""

        def full_logits(self, tokens: torch.Tensor) -> torch.Tensor:
            return model_of("gpt").full_logits(tokens[:1]).expand(len(tokens), -1, -1)

    found = Repeated(gpt()).generate(tokens.expand(n, 2), max_new_tokens=1, seed=6, **options)[:, 2]
    frequency = torch.bincount(found, minlength=101) / n
    assert ((frequency - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt() + 1 / n * (expected > 0)).all()


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_a_prompt_longer_than_the_model_sees_is_windowed(name: str) -> None:
    model, length = model_of(name), MODELS[name].max_seq_len
    long = prompt(length + 7)
    found = model.generate(long, max_new_tokens=1, temperature=0.0)
    assert torch.equal(found[:, :-1], long)
    assert torch.equal(found[:, -1], model.full_logits(long[:, -length:])[:, -1].argmax(-1))
    assert not torch.equal(found[:, -1], model.full_logits(long[:, :length])[:, -1].argmax(-1))


def test_generation_leaves_no_graph_and_takes_any_count() -> None:
    model = model_of("gpt")
    assert torch.equal(model.generate(prompt(), max_new_tokens=0), prompt())
    assert not model.generate(prompt(), max_new_tokens=2).requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_the_model_s_own_dropout_does_not_touch_generation() -> None:
    dropped = build_random(replace(gpt(), dropout=0.5, attention_dropout=0.5), Mesh(), torch.float64)
    assert dropped.generate(prompt(), max_new_tokens=NEW, temperature=0.0).tolist() == one_process("gpt")["greedy"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": -0.1}, r"temperature \(-0.1\) >= 0"),
        ({"top_k": 0}, r"top_k \(0\) >= 1"),
        ({"top_p": 0.0}, r"0 < top_p \(0.0\) <= 1"),
        ({"top_p": 1.1}, r"0 < top_p \(1.1\) <= 1"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        model_of("gpt").generate(prompt(), max_new_tokens=1, **options)
