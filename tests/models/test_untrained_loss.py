"""An untrained model knows nothing: its loss is ln(vocab_size), whatever the padding and the layout."""

import math
from dataclasses import replace

import pytest
import torch

from tests.distributed import Ranks
from tests.proofs.cases import LAYOUTS, Config, Layout, build, gpt, llama
from tpformer import Mesh

MODELS: dict[str, Config] = {
    "gpt": gpt(init_std=1e-5),
    "gpt-untied-129": gpt(init_std=1e-5, vocab_size=129, tie_embeddings=False),
    "llama-tied": llama(init_std=1e-5, tie_embeddings=True),
    "llama-128": llama(init_std=1e-5, vocab_size=128),
}


def loss(config: Config, mesh: Mesh) -> float:
    """Of random tokens and targets."""
    model = build(config, mesh).double()
    tokens, targets = torch.randint(config.vocab_size, (2, 2, 8), generator=torch.Generator().manual_seed(0))
    return model.loss(tokens, targets).item()


def loss_on(name: str, layout: Layout) -> float:
    """On a rank."""
    return loss(MODELS[name], layout.mesh())


@pytest.mark.parametrize("name", MODELS)
def test_the_untrained_loss_is_the_logarithm_of_the_vocabulary(name: str, ranks: Ranks) -> None:
    expected = math.log(MODELS[name].vocab_size)  # of 101: 4.615, where ln(128), the padded one, is 4.852
    found = [loss(MODELS[name], Mesh())]
    for layout in LAYOUTS[1:6]:
        found += ranks(loss_on, layout.world_size, name, layout)
    # the logits are sums of 32 products x w with x of size 1 and w of 1e-5, their spread 6e-5
    assert found == [pytest.approx(expected, abs=1e-4)] * len(found)


@pytest.mark.parametrize("name", MODELS)
def test_with_the_usual_spread_it_is_near(name: str) -> None:
    config = replace(MODELS[name], init_std=0.02)
    assert loss(config, Mesh()) == pytest.approx(math.log(config.vocab_size), abs=0.05)
