"""The greedy runs that test_generate_greedy.py compares; the ranks load this file, which imports no transformers."""

from typing import Any

import torch

from tests.models.oracle import Arrays
from tests.proofs.cases import Config, Layout, build
from tpformer import Mesh, load_full_state

LENGTHS = (6, 2, 4)
NEW = 6
Tokens = list[list[int]]


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask, padded on the left; each with its own first token, which transformers penalises too."""
    tokens = torch.randint(101, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    for row, length in enumerate(LENGTHS):
        mask[row, : max(LENGTHS) - length] = 0
        tokens[row, : max(LENGTHS) - length] = tokens[row, max(LENGTHS) - length]
    return tokens, mask


def run(generate: Any, ends: list[int], **names: str) -> dict[str, Tokens]:
    """What a generate gives after the prompts: plainly, with a penalty, and with stop tokens."""
    tokens, mask = prompts()
    penalty = {"repetition_penalty": 1.8}
    stops: dict[str, Any] = {names["stop"]: tuple(ends) if names["stop"] == "stop_tokens" else ends, names["pad"]: 77}
    cases: dict[str, Any] = {"plain": {}, "penalty": penalty, "stop": penalty | stops}
    return {case: generate(tokens, attention_mask=mask, **options).tolist() for case, options in cases.items()}


def ours(config: Config, weights: Arrays, ends: list[int], layout: Layout | None = None) -> dict[str, Tokens]:
    """On a rank, or without a layout on one process."""
    model = build(config, layout.mesh() if layout else Mesh()).double()
    load_full_state(model, {name: torch.from_numpy(x) for name, x in weights.items()})

    def generate(tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        return model.generate(tokens, max_new_tokens=NEW, temperature=0.0, **options)

    return run(generate, ends, stop="stop_tokens", pad="pad_token")
