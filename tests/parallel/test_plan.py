"""A plan that does not fit is told at once, with everything that is wrong, and nothing is changed."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tpformer
from tests.parallel.owned import ATTENTION, CASES, HEAD_NORMS, MLP, WHOLE, Block, Case, Own, Plan, make
from tpformer import Mesh
from tpformer.mesh import Axis

TWO = Mesh(tp=Axis("tp", 2))  # no process group: whoever communicates fails


class Fused(nn.Module):
    """gate|up in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(8, 32), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(gate * up)


class Holder(nn.Module):
    """Some modules."""

    def __init__(self, **modules: nn.Module):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def linear(inputs: int = 8, outputs: int = 8, **options: Any) -> nn.Linear:
    """A layer with an attribute, or so."""
    return nn.Linear(inputs, outputs, **options)


def hooked() -> nn.Linear:
    layer = linear()
    layer.register_forward_hook(lambda *_: None)
    return layer


def with_gradient() -> nn.Linear:
    layer = linear()
    layer.weight.grad = torch.zeros(8, 8)
    return layer


def tied() -> Holder:
    """An embedding and a head with one weight."""
    embedding, head = nn.Embedding(128, 8), linear(8, 128)
    head.weight = embedding.weight
    return Holder(embedding=embedding, head=head)


def attention(kv_heads: int) -> nn.Module:
    """Four heads of 4."""
    model: Any = Holder(q=linear(8, 16), k=linear(8, 4 * kv_heads), o=linear(16, 8))
    model.head_dim = 4
    return model


PAIR = {"up": "column", "down": "row"}
QKO = {"[qk]": "column", "o": "row"}
WRONG: dict[str, tuple[nn.Module, dict[str, str], str]] = {
    "nothing at all": (Block(8), {}, "the plan is empty"),
    "a style": (Block(8), {"up": "colum"}, "style 'colum' of 'up' must be one of column, row, vocab, partial, copy"),
    "no match": (Block(8), {"gate": "column", **PAIR}, "pattern 'gate' \\(column\\) matches no module"),
    "two styles": (Block(8), {**PAIR, "u*": "row"}, "up: is column 'up' and row 'u\\*'"),
    "not a layer": (Own(), {"blocks.*": "column"}, "blocks.0 and 1 more: is a Block, not an nn.Linear"),
    "an embedding in rows": (Own(), {"embedding": "row"}, "embedding: is a Embedding, not an nn.Linear"),
    "a subclass": (
        nn.MultiheadAttention(8, 2),
        {"out_proj": "row"},
        "out_proj: is a NonDynamicallyQuantizableLinear, not an nn.Linear",
    ),
    "a column alone": (
        Block(8),
        {"up": "column"},
        "up: column 'up' needs a row that takes its output, .* not none; a v",
    ),
    "a row alone": (Block(8), {"down": "row"}, "down: row 'down' needs a column that gives its input, .* not none"),
    "a row elsewhere": (
        Holder(a=Block(8), b=Block(8)),
        {"*.up": "column", "a.down": "row"},
        "b.up: column '\\*.up' needs a row that takes its output, .*, not row 'a.down'",
    ),
    "widths": (Holder(up=linear(8, 16), down=linear(8, 8)), PAIR, r"down: row 'down' takes in_features \(8\)"),
    "fused": (
        Fused(),
        {"gate_up": "column", "down": "row"},
        r"gate_up: .* gives out_features \(32\), .* several outputs",
    ),
    "tp of columns": (
        Holder(up=linear(8, 7), down=linear(7)),
        PAIR,
        r"up: out_features \(7\) must be divisible by tp \(2\)",
    ),
    "tp of rows": (Holder(up=linear(8, 7), down=linear(7)), PAIR, r"down: in_features \(7\) must be divisible by tp"),
    "fewer key heads than tp": (
        attention(1),
        QKO,
        r"k: out_features \(4\), 1 heads of 4: tp \(2\) must divide the heads",
    ),
    "hooks": (Holder(up=hooked(), down=linear()), PAIR, "up: has hooks, which would see one rank's part"),
    "a gradient": (Holder(up=with_gradient(), down=linear()), PAIR, "up: weight has a gradient or hooks"),
    "max_norm": (Holder(e=nn.Embedding(9, 4, max_norm=1.0)), {"e": "vocab"}, r"e: max_norm \(1.0\) cannot be split"),
    "sparse": (Holder(e=nn.Embedding(9, 4, sparse=True)), {"e": "vocab"}, r"e: sparse \(True\) cannot be split"),
    "one of two that are tied": (
        tied(),
        {"embedding": "vocab"},
        "embedding.weight: is also head.weight, so that the styles must be the same, not copy, vocab",
    ),
    "a copy without parameters": (
        Own(),
        {"blocks": "partial"},
        "blocks: is a ModuleList, which has no parameters of its",
    ),
    "a copy between": (
        Holder(q=linear(), norm=nn.LayerNorm(4), o=linear()),
        {"q": "column", "o": "row"},
        r"norm: has parameters \(4,\), \(4,\) and is not in the plan, but beside column 'q' and row 'o': is it",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_and_nothing_changed(name: str) -> None:
    model, plan, message = WRONG[name]
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        tpformer.parallelize(model, plan, TWO)  # type: ignore[arg-type]
    assert dict(model.named_modules()) == before


def test_all_that_is_wrong_is_in_one_line() -> None:
    plan = {"*.q_proj": "column", "*.up_proj": "column", "*.down_proj": "row", "*.norm": "row", "lm_head": "column"}
    with pytest.raises(ValueError, match="the plan does not fit") as caught:
        tpformer.parallelize(make(CASES["llama"]), plan, TWO)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    for part in ("model.layers.0.self_attn.q_proj and 1 more: column '*.q_proj' needs", "lm_head: column", "'*.norm'"):
        assert part in message


def test_a_head_norm_must_be_in_the_plan() -> None:
    with pytest.raises(
        ValueError, match=r"layers.0.self_attn.q_norm and 3 more: has parameters \(6,\) and is not in the"
    ):
        tpformer.parallelize(make(Case("Qwen3", WHOLE, {"head_dim": 6})), WHOLE, TWO)


def test_gpt2_is_refused() -> None:
    """Its layers keep their weights transposed, and q|k|v in one."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=16, n_head=4, vocab_size=101))
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_attn: is a Conv1D, not an nn.Linear"):
        tpformer.parallelize(model, {"*.attn.c_attn": "column", "*.attn.c_proj": "row"}, TWO)


def test_rows_and_columns_in_modules_of_their_own() -> None:
    """BERT's query, key and value are beside attention.output.dense, intermediate.dense beside output.dense."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32}
    model = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=101))
    columns: Plan = dict.fromkeys(["*.self.query", "*.self.key", "*.self.value", "*.intermediate.dense"], "column")
    with pytest.raises(ValueError, match=r"intermediate\.dense: column .* needs a row .* 'encoder\.\*\.attention"):
        tpformer.parallelize(model, columns | {"encoder.*.attention.output.dense": "row"}, Mesh())
    tpformer.parallelize(model, columns | {"encoder.*.output.dense": "row"}, Mesh())


def test_sequence_parallel_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence_parallel must be False"):
        tpformer.parallelize(make(CASES["llama"]), ATTENTION, Mesh(sequence_parallel=True))


def test_a_plan_that_fits_can_be_a_part() -> None:
    for plan in (ATTENTION, MLP, ATTENTION | HEAD_NORMS):
        tpformer.parallelize(make(CASES["qwen3" if plan != ATTENTION else "llama"]), plan, Mesh())
