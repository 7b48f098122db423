"""Generation: one seed gives the same tokens on any layout; and the options do what they say, at their edges too."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch

from tests.distributed import Ranks
from tests.proofs.cases import Config, Layout, build_random, gpt, llama
from tpformer import GPT, Llama, Mesh
from tpformer.models.generate import _whole_sequences
from tpformer.models.sampling import SamplingOptions

MODELS: dict[str, Config] = {
    "gpt": gpt(max_seq_len=16),
    "llama": llama(num_kv_heads=2, vocab_size=257),
    "mistral": llama(num_kv_heads=1, sliding_window=3),
}
PADDED = {"attention_mask": torch.tensor([[1] * 7, [0] * 4 + [1] * 3])}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "hot": {"temperature": 1.5, "seed": 1},
    "filtered": {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "seed": 4},
    "penalised": {"temperature": 0.0, "repetition_penalty": 5.0},
    "padded": {"temperature": 0.9, "seed": 3, **PADDED},
}
NEW = 7  # tokens after a prompt of 7
Tokens = dict[str, list[list[int]]]


def prompt(length: int = 7, rows: int = 2) -> torch.Tensor:
    """Tokens of every vocabulary here."""
    return torch.randint(101, (rows, length), generator=torch.Generator().manual_seed(0))


def generated(name: str, mesh: Mesh) -> Tokens:
    """What each of OPTIONS gives after a prompt."""
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


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name in ("gpt", "llama", "mistral") for layout in LAYOUTS],
    ids=str,
)
def test_one_seed_gives_the_same_tokens_on_any_layout(name: str, layout: Layout, ranks: Ranks) -> None:
    assert ranks(generated_on, layout.world_size, name, layout) == [one_process(name)] * layout.world_size


class Interrupted(Exception):
    """What a callback raises."""


def meshes_after() -> list[bool]:
    """On a rank: is every module's mesh again the one with sequence parallelism, after an end and after an error?"""
    mesh = Mesh.create(tp=2, sequence_parallel=True, device="cpu")
    model = build_random(MODELS["llama"], mesh, torch.float64)
    found = []

    def interrupt(column: torch.Tensor) -> None:
        found.append(any(m.mesh is mesh for m in model.modules() if hasattr(m, "mesh")))
        raise Interrupted

    model.generate(prompt(), max_new_tokens=2)
    found.append(all(m.mesh is mesh for m in model.modules() if hasattr(m, "mesh")))
    with pytest.raises(Interrupted):
        model.generate(prompt(), max_new_tokens=2, stream=interrupt)
    found.append(all(m.mesh is mesh for m in model.modules() if hasattr(m, "mesh")))
    logits = model.full_logits(prompt(8))
    assert logits.shape == (2, 8, 257)
    return found


def test_sequence_parallelism_comes_back_after_errors_too(ranks: Ranks) -> None:
    assert ranks(meshes_after, 2) == [[True, False, True]] * 2


def test_without_sequence_parallelism_nothing_is_touched() -> None:
    model = model_of("gpt")
    before = [m.mesh for m in model.modules() if hasattr(m, "mesh")]
    with _whole_sequences(model):
        assert all(a is b for a, b in zip(before, [m.mesh for m in model.modules() if hasattr(m, "mesh")], strict=True))


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
    hot = model_of("gpt").generate(prompt(1, 4), max_new_tokens=15, temperature=1e9)[:, 1:]
    for tokens in (*hot, *hot.T):
        assert len(tokens.unique()) > len(tokens) // 2


def test_limits_beyond_the_vocabulary_filter_nothing() -> None:
    free = model_of("gpt").generate(prompt(), max_new_tokens=6, seed=5)
    for options in ({"top_k": 101}, {"top_k": 10**6}, {"top_p": 1.0}, {"top_k": 101, "top_p": 1.0}):
        found = model_of("gpt").generate(prompt(), max_new_tokens=6, seed=5, **options)
        assert torch.equal(found, free), options


def test_options_come_by_name_or_together() -> None:
    sampling = SamplingOptions(temperature=1.2, top_k=30, seed=9)
    by_name = model_of("gpt").generate(prompt(), max_new_tokens=NEW, temperature=1.2, top_k=30, top_p=0.9, seed=4)
    together = model_of("gpt").generate(prompt(), max_new_tokens=NEW, sampling=sampling, top_p=0.9, seed=4)
    assert by_name.tolist() == together.tolist() == one_process("gpt")["filtered"]
    with pytest.raises(TypeError, match="top_q"):
        model_of("gpt").generate(prompt(), max_new_tokens=1, top_q=0.9)


def test_rows_that_met_a_stop_token_are_filled_and_all_of_them_end_it() -> None:
    model, options = model_of("llama"), OPTIONS["hot"]
    free = torch.tensor(one_process("llama")["hot"])
    first, second = free[0, 9].item(), free[1, 11].item()
    assert torch.isin(free[:, 7:], torch.tensor([first, second])).nonzero().tolist() == [[0, 2], [1, 4]]
    found = model.generate(prompt(), max_new_tokens=NEW, stop_tokens=(first, second), **options)
    assert found.shape == (2, 12)
    assert torch.equal(found[1], free[1, :12])
    assert torch.equal(found[0], torch.cat([free[0, :10], free.new_full((2,), first)]))
    beyond = model.generate(prompt(), max_new_tokens=NEW, stop_tokens=(first,), pad_token=-7, **options)
    assert torch.equal(beyond[1], free[1])
    assert beyond[0].tolist() == [*free[0, :10].tolist(), -7, -7, -7, -7]


def test_the_stream_is_told_each_column_as_it_is_made() -> None:
    columns: list[torch.Tensor] = []
    found = model_of("gpt").generate(prompt(), max_new_tokens=NEW, stream=columns.append, **OPTIONS["hot"])
    assert torch.equal(torch.stack(columns, dim=1), found[:, 7:])
    assert found.tolist() == one_process("gpt")["hot"]


def test_progress_is_shown_where_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    model_of("gpt").generate(prompt(), max_new_tokens=NEW)
    assert capsys.readouterr().err == ""
    model_of("gpt").generate(prompt(), max_new_tokens=NEW, progress=True)
    assert "7/7" in capsys.readouterr().err


def test_generation_leaves_no_graph_and_takes_any_count() -> None:
    model = model_of("gpt")
    assert torch.equal(model.generate(prompt(), max_new_tokens=0), prompt())
    assert model.generate(prompt(), max_new_tokens=9).shape == (2, 16)  # all that the model takes
    assert not model.generate(prompt(), max_new_tokens=2).requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_the_model_s_own_dropout_does_not_touch_generation() -> None:
    config = replace(MODELS["gpt"], dropout=0.5, attention_dropout=0.5)
    dropped = build_random(config, Mesh(), torch.float64)
    assert dropped.generate(prompt(), max_new_tokens=NEW, temperature=0.0).tolist() == one_process("gpt")["greedy"]


def mask(*rows: list[int]) -> dict[str, torch.Tensor]:
    return {"attention_mask": torch.tensor(rows)}


@pytest.mark.parametrize(
    ("tokens", "options", "text"),
    [
        (prompt(), {"max_new_tokens": 10}, r"prompt \(7\) \+ max_new_tokens \(10\) must be at most max_seq_len \(16\)"),
        (prompt(), {"max_new_tokens": -1}, r"max_new_tokens \(-1\).* at least 0"),
        (prompt()[0], {}, r"tokens \(7,\) must be \(batch, length\)"),
        (prompt()[:, :0], {}, r"tokens \(2, 0\) must be \(batch, length\), both at least 1"),
        (prompt()[:0], {}, r"tokens \(0, 7\) must be"),
        (prompt() + 95, {}, r"token \d+ must be in 0\.\.100"),
        (prompt() - 50, {}, r"token -\d+ must be in 0\.\.100"),
        (prompt(), {"stop_tokens": (3, 101)}, r"stop token 101 must be in 0\.\.100"),
        (prompt(3), mask([1, 1, 1]), r"attention_mask \(1, 3\) must have the shape \(2, 3\)"),
        (prompt(3), mask([1, 1, 1], [1, 1, 0]), r"row 1 must be zeros, then at least one 1: pad prompts on the left"),
        (prompt(3), mask([1, 0, 1], [1, 1, 1]), r"row 0 must be zeros"),
        (prompt(3), mask([1, 1, 1], [0, 0, 0]), r"row 1 must be zeros"),
        (prompt(), {"top_k": 0}, r"top_k \(0\) >= 1"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_does_not_fit_is_refused(tokens: torch.Tensor, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        model_of("gpt").generate(tokens, **({"max_new_tokens": 1} | options))
