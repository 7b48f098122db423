"""The command that a plan prints is one that examples/pretrain.py takes, and means that plan."""

import shlex
from dataclasses import replace
from typing import Any

import pytest

from tpformer import GPTConfig, LlamaConfig, ParallelConfig, RopeScaling
from tpformer.planner.candidate import Candidate
from tpformer.planner.flags import pretrain_flags, torchrun_command
from tpformer.planner.known_models import known_model, known_models
from tpformer.train.flags import parse_config

LAYOUTS: list[dict[str, Any]] = [
    {"tp": 4, "sequence_parallel": True, "dp": 2, "dp_mode": "zero2", "precision": "bf16"},
    {"pp": 4, "pp_schedule": "interleaved_1f1b", "stages_per_rank": 2, "dp": 2},
    {"pp": 2, "pp_schedule": "zbv", "stages_per_rank": 2, "dp": 1, "recompute": "full"},
    {"dp": 8, "dp_mode": "hsdp", "dp_shard": 4, "recompute": "selective", "recompute_modules": ("mlp", "attention")},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["llama-8b", "gpt2", "qwen3-8b", "mistral-7b"])
def test_the_flags_mean_the_plan(name: str, options: dict[str, Any]) -> None:
    candidate = Candidate(known_model(name), ParallelConfig(**options), 1024, 16, 2)
    config = parse_config(pretrain_flags(candidate))
    assert config.parallel == candidate.parallel
    assert (config.data.seq_len, config.run.batch_size, config.run.micro_batch_size) == (1024, 16, 2)
    assert config.family == ("gpt" if isinstance(candidate.model, GPTConfig) else "llama")
    for field in (
        "vocab_size",
        "hidden_size",
        "num_layers",
        "num_heads",
        "max_seq_len",
        "tie_embeddings",
        "activation",
    ):
        assert getattr(config.model, field) == getattr(candidate.model, field), field
    assert config.model.attention == candidate.model.attention


def test_stretched_positions_are_flags_too() -> None:
    model = replace(LlamaConfig(max_seq_len=4096), rope_scaling=RopeScaling("llama3", 32.0, 8192, 1.0, 4.0))
    config = parse_config(pretrain_flags(Candidate(model, ParallelConfig(dp=1), 1024, 16, 2)))
    assert config.model.rope_scaling == model.rope_scaling


def test_every_node_has_as_many_processes() -> None:
    """Twelve on nodes of eight: two nodes of six. A machine of CPUs is one node."""
    twelve = Candidate(known_model("gpt2"), ParallelConfig(dp=12), 1024, 12, 1)
    assert shlex.split(torchrun_command(twelve, 8))[1:5] == ["--nproc-per-node", "6", "--nnodes", "2"]
    cpus = Candidate(known_model("gpt2"), ParallelConfig(dp=4), 1024, 4, 1, on_cpu=True)
    assert shlex.split(torchrun_command(cpus, 2))[:4] == ["torchrun", "--nproc-per-node", "4", "examples/pretrain.py"]


def test_the_command_of_one_node_and_of_several() -> None:
    one = Candidate(known_model("gpt2"), ParallelConfig(dp=4), 1024, 4, 1)
    assert shlex.split(torchrun_command(one, 8))[:4] == ["torchrun", "--nproc-per-node", "4", "examples/pretrain.py"]
    several = Candidate(known_model("gpt2"), ParallelConfig(dp=32), 1024, 32, 1)
    words = shlex.split(torchrun_command(several, 8))
    assert words[1:5] == ["--nproc-per-node", "8", "--nnodes", "4"]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gpt2", 0.1244),
        ("gpt2-xl", 1.558),
        ("gpt3-175b", 174.6),
        ("llama2-7b", 6.74),
        ("llama2-13b", 13.02),
        ("llama2-70b", 68.98),
        ("llama-1b", 1.236),
        ("llama-8b", 8.03),
        ("llama-70b", 70.55),
        ("llama-405b", 405.85),
        ("mistral-7b", 7.24),
        ("qwen3-8b", 8.19),
        ("qwen3-32b", 32.76),
    ],
)
def test_the_known_models_have_as_many_parameters_as_is_said_of_them(name: str, billions: float) -> None:
    assert known_model(name).num_parameters() / 1e9 == pytest.approx(billions, rel=3e-3)


def test_an_unknown_model_is_named_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match="model 'llama-9b' is not known; take one of gpt2"):
        known_model("llama-9b")
    assert len(known_models()) > 10
