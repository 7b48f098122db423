"""The rotary tables against transformers' own, for every scaling."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tpformer import RopeScaling
from tpformer.layers.rope import rope_frequencies, rope_table
from tpformer_kernels import apply_rope

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CASES: dict[str, tuple[int, float, dict[str, Any]]] = {  # head_dim, theta, transformers' parameters
    "linear": (64, 1e4, {"rope_type": "linear", "factor": 4.0}),
    "Llama 3.1": (128, 5e5, {"rope_type": "llama3", **LLAMA3}),
    "Llama 3.2": (64, 5e5, {"rope_type": "llama3", **LLAMA3, "factor": 32.0}),
    "llama3 of other bounds": (
        34,
        1e3,
        {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 9.0},
    ),
    "yarn": (128, 1e6, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
    "yarn, short context": (16, 1e4, {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64}),
    "yarn, slow end beyond the dims": (
        *(64, 1e4),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 131072},
    ),
    "yarn of other ramps": (
        *(80, 1e5),
        {
            "rope_type": "yarn",
            "factor": 2.5,
            "original_max_position_embeddings": 2048,
            "beta_fast": 20.0,
            "beta_slow": 3.0,
            "attention_factor": 1.3,
        },
    ),
    "yarn of factor 1": (32, 1e4, {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 4096}),
}


def ours(parameters: dict[str, Any]) -> RopeScaling:
    """transformers' parameters in our words."""
    names = {"rope_type": "kind", "original_max_position_embeddings": "original_max_seq_len"}
    return RopeScaling(**{names.get(name, name): value for name, value in parameters.items()})


def theirs(head_dim: int, theta: float, parameters: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": theta, **parameters},
    )


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_attention_factor_are_those_of_transformers(name: str) -> None:
    head_dim, theta, parameters = CASES[name]
    expected, expected_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs(head_dim, theta, parameters), "cpu")
    frequencies, factor = rope_frequencies(head_dim, theta, ours(parameters))
    assert factor == expected_factor
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    if parameters["factor"] > 1:  # the scaling was not ignored
        plain, _ = rope_frequencies(head_dim, theta)
        assert not torch.allclose(frequencies, plain, rtol=0.1)


@pytest.mark.parametrize("name", ["none", *CASES])
def test_table_and_rotation_are_those_of_transformers(name: str) -> None:
    head_dim, theta, parameters = CASES.get(name, (32, 1e4, {"rope_type": "default"}))
    embedding = LlamaRotaryEmbedding(theirs(head_dim, theta, parameters))
    expected_cos, expected_sin = embedding(torch.zeros(1), torch.arange(19).unsqueeze(0))  # (1, s, k)
    cos, sin = rope_table(19, head_dim, theta, ours(parameters) if name in CASES else RopeScaling(), torch.zeros(1))
    for table, expected in ((cos, expected_cos), (sin, expected_sin)):
        assert table.shape == (19, 1, head_dim // 2)
        torch.testing.assert_close(torch.cat([table, table], -1).transpose(0, 1), expected, rtol=1e-6, atol=2e-6)
    q = torch.randn(2, 19, 3, head_dim, generator=torch.Generator().manual_seed(0))
    turned, _ = apply_rotary_pos_emb(q.transpose(1, 2), q.transpose(1, 2), expected_cos, expected_sin)
    for ours_turned in apply_rope(q, q, cos, sin):
        torch.testing.assert_close(ours_turned, turned.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_table_is_in_fp32_or_wider_whatever_the_dtype_of_its_use(dtype: torch.dtype) -> None:
    length = 4099  # positions that bf16 cannot tell apart
    exact = rope_table(length, 8, 1e4, RopeScaling(), torch.zeros(1))
    tables = rope_table(length, 8, 1e4, RopeScaling(), torch.zeros(1, dtype=dtype))
    for table, expected in zip(tables, exact, strict=True):
        assert table.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(table, expected.to(table.dtype))
        assert not torch.equal(table[-1], table[-2])


def test_scores_depend_on_the_distance_of_positions_only() -> None:
    cos, sin = rope_table(12, 8, 1e2, RopeScaling(), torch.zeros(1, dtype=torch.float64))
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k = (t[0, :, 0] for t in apply_rope(q.expand(1, 12, 1, 8), k.expand(1, 12, 1, 8), cos, sin))
    scores = q @ k.T
    for distance in range(5):
        line = scores.diagonal(-distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-5, atol=1e-5)
    assert scores.diagonal(0)[0] != scores.diagonal(-1)[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "ntk", "factor": 2.0}, r"rope scaling kind \('ntk'\) must be"),
        ({"kind": "linear", "factor": 0.5}, r"rope scaling factor \(0.5\) must be at least 1"),
    ],
)
def test_wrong_scalings_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeScaling(**fields)
