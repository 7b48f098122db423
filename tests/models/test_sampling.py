"""The next token's choice: transformers' filters and penalty, and the frequencies of the distribution."""

from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tpformer.models.sampling import Sampler, SamplingOptions, draw, keep_likeliest, penalise
from tpformer.random import Key

ROWS, VOCABULARY = 6, 97


def logits(seed: int = 0, rows: int = ROWS) -> torch.Tensor:
    """Spread widely enough for every filter to leave something out."""
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prompts() -> torch.Tensor:
    """Some tokens twice."""
    return torch.randint(20, (ROWS, 11), generator=torch.Generator().manual_seed(1))


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
        found = keep_likeliest(probabilities.log(), top_k, top_p).isfinite()[0].nonzero().flatten().tolist()
        assert found == kept, (top_k, top_p)


def test_top_p_1_leaves_all() -> None:
    """Whatever the sum of the probabilities is rounded to."""
    wide = 3 * torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    assert (wide.softmax(-1).sort(-1, descending=True).values.cumsum(-1)[:, :-1] >= 1).any()
    assert torch.equal(keep_likeliest(wide, None, 1.0), wide)


@pytest.mark.parametrize("top_p", [None, 0.05, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, 96, 97, 500])
def test_the_filters_are_transformers(top_k: int | None, top_p: float | None) -> None:
    expected = logits()
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(prompts(), expected)
    if top_p is not None and top_p < 1:
        expected = TopPLogitsWarper(top_p)(prompts(), expected)
    assert torch.equal(keep_likeliest(logits(), top_k, top_p), expected)


def test_equal_logits_at_the_limit_of_top_k_all_stay_as_with_transformers() -> None:
    equal = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    found = keep_likeliest(equal, 2, None)
    assert torch.equal(found, TopKLogitsWarper(2)(prompts(), equal))
    assert found.isfinite().sum() == 3


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_the_penalty_is_transformers(penalty: float) -> None:
    sampler = Sampler(SamplingOptions(repetition_penalty=penalty), prompts(), None, VOCABULARY)
    assert sampler._used is not None
    expected = RepetitionPenaltyLogitsProcessor(penalty)(prompts(), logits())
    found = penalise(logits(), sampler._used, penalty)
    assert torch.equal(found, expected)
    assert not torch.equal(found, logits())


def test_the_penalty_comes_first_and_counts_what_was_chosen() -> None:
    """Greedy, three steps over the same logits, beside transformers' processors over the growing rows."""
    options = SamplingOptions(temperature=0.0, repetition_penalty=1.7)
    sampler, rows = Sampler(options, prompts(), None, VOCABULARY), prompts()
    for _ in range(3):
        expected = RepetitionPenaltyLogitsProcessor(1.7)(rows, logits()).argmax(-1)
        assert torch.equal(sampler.choose(logits()), expected)
        rows = torch.cat([rows, expected.unsqueeze(1)], dim=1)
    assert len({tuple(row[-3:].tolist()) for row in rows}) > 1


def test_all_options_together_are_transformers_processors_in_their_order() -> None:
    options = SamplingOptions(temperature=0.6, top_k=9, top_p=0.8, repetition_penalty=1.4, seed=5)
    x = logits()
    for processor in (
        RepetitionPenaltyLogitsProcessor(1.4),
        TemperatureLogitsWarper(0.6),
        TopKLogitsWarper(9),
        TopPLogitsWarper(0.8),
    ):
        x = processor(prompts(), x)
    found = Sampler(options, prompts(), None, VOCABULARY).choose(logits())
    assert torch.equal(found, draw(x, Key(5).fold("generate", 0)))


def test_padding_is_not_penalised() -> None:
    """Whatever it is: the row is what it would be alone."""
    mask = torch.ones(ROWS, 11, dtype=torch.bool)
    mask[0, :4] = False
    padded = prompts()
    padded[0, :4] = 96  # in no prompt
    options = SamplingOptions(repetition_penalty=2.0)
    used = Sampler(options, padded, mask, VOCABULARY)._used
    alone = Sampler(options, prompts()[:1, 4:], None, VOCABULARY)._used
    assert used is not None
    assert alone is not None
    assert torch.equal(used[:1], alone)
    assert not used[0, 96]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 2.0}, {"top_k": 5}, {"top_p": 0.6, "temperature": 0.7}], ids=str
)
def test_the_tokens_have_the_frequencies_of_the_distribution(options: dict[str, Any]) -> None:
    """20000 equal rows: each token as often as its probability says, within five standard errors."""
    n, sampling = 20000, SamplingOptions(seed=6, **options)
    one = logits(rows=1) / 3
    expected = keep_likeliest(one / sampling.temperature, sampling.top_k, sampling.top_p).softmax(-1)[0]
    found = Sampler(sampling, torch.zeros(n, 1, dtype=torch.int64), None, VOCABULARY).choose(one.expand(n, -1))
    frequency = torch.bincount(found, minlength=VOCABULARY) / n
    assert ((frequency - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt() + 1 / n * (expected > 0)).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": -0.1}, r"temperature \(-0.1\) >= 0"),
        ({"temperature": float("nan")}, r"temperature \(nan\) >= 0"),
        ({"top_k": 0}, r"top_k \(0\) >= 1"),
        ({"top_p": 0.0}, r"0 < top_p \(0.0\) <= 1"),
        ({"top_p": 1.1}, r"0 < top_p \(1.1\) <= 1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty \(0.0\) must be above 0"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SamplingOptions(**options)
