"""How fast a Llama generates at tp 1, beside transformers' own `generate` on the same weights and prompts.

    python -m benchmarks.generation

Greedy, with a cache of keys and values on either side. Before the clock starts all must have given the same tokens.
They run in turn, so that a slow minute of the machine falls on all of them; needs the package transformers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from benchmarks import harness
from benchmarks.peers.huggingface import HuggingFaceLlama
from benchmarks.peers.plain import PlainLlamaConfig
from tpformer import Llama, LlamaConfig, Mesh, full_parameter


@dataclass(frozen=True)
class Options:
    """Measure greedy generation of tpformer and of transformers."""

    hidden: int = 512
    """Width of the model."""
    layers: int = 12
    """Number of decoder layers."""
    heads: int = 8
    """Query heads."""
    kv_heads: int = 4
    """Key and value heads."""
    ffn: int = 1408
    """Inner width of the MLP."""
    vocab: int = 16384
    """Vocabulary size; embedding and head are not tied."""
    prompt: int = 128
    """Tokens of each prompt."""
    new: int = 64
    """Tokens generated after it."""
    batches: tuple[int, ...] = (1, 4)
    """Prompts at a time."""
    rounds: int = 9
    """Timed runs of each."""
    seed: int = 0
    """Seed of the weights and of the prompts."""
    device: str = "cpu"
    """cpu or cuda."""
    output: Path | None = None
    """Where the record is written; by default benchmarks/results/generation_<device>.json."""


Generate = Callable[[Tensor], Tensor]


def build(options: Options, device: torch.device) -> tuple[dict[str, Generate], int]:
    """Who generates, by name, and how many parameters they have."""
    sizes = {
        "vocab_size": options.vocab,
        "hidden_size": options.hidden,
        "num_layers": options.layers,
        "num_heads": options.heads,
        "num_kv_heads": options.kv_heads,
        "ffn_hidden_size": options.ffn,
        "max_seq_len": options.prompt + options.new,
    }
    config = LlamaConfig(**sizes)  # type: ignore[arg-type]
    ours = Llama(config, Mesh(device=device), seed=options.seed)
    theirs = HuggingFaceLlama(PlainLlamaConfig(**sizes))
    theirs.load_from_tpformer({name: full_parameter(ours, name) for name, _ in ours.named_parameters()})
    causal = theirs.causal.to(device).eval()

    def transformers(tokens: Tensor, **cache: str) -> Tensor:
        length: dict[str, Any] = {"max_new_tokens": options.new, "min_new_tokens": None, "eos_token_id": None}
        mask = torch.ones_like(tokens)
        found: Tensor = causal.generate(
            tokens, attention_mask=mask, do_sample=False, use_cache=True, pad_token_id=0, **length, **cache
        )
        return found

    return {
        "tpformer": lambda tokens: ours.generate(tokens, max_new_tokens=options.new, temperature=0.0),
        "transformers": transformers,
        "transformers, static cache": lambda tokens: transformers(tokens, cache_implementation="static"),
    }, config.num_parameters()


def check(contenders: dict[str, Generate], tokens: Tensor) -> None:
    """Raises RuntimeError unless all generate the same tokens."""
    expected = contenders["tpformer"](tokens)
    for name, generate in contenders.items():
        if not torch.equal(generate(tokens), expected):
            raise RuntimeError(f"{name} does not generate the tokens of tpformer")


def seconds(generate: Generate, tokens: Tensor, device: torch.device) -> float:
    """Of the GPU; of a CPU what this process used of it, so that busy neighbours do not count."""
    if device.type == "cuda":
        return harness.seconds_alone(lambda: generate(tokens), device)
    start = time.process_time()
    generate(tokens)
    return time.process_time() - start


def measure(options: Options, device: torch.device) -> dict[str, Any]:
    """Check and time everyone at every batch size; the record."""
    contenders, parameters = build(options, device)
    results = []
    for batch in options.batches:
        tokens, _ = harness.random_text(options.vocab, batch, options.prompt, options.seed, device)
        check(contenders, tokens)
        samples: dict[str, list[harness.Sample]] = {name: [] for name in contenders}
        for index in tqdm(range(options.rounds), desc=f"batch {batch}", unit="round"):
            for name in contenders if index % 2 == 0 else reversed(contenders):
                samples[name].append(harness.Sample(seconds(contenders[name], tokens, device), None))
        medians = {name: harness.Timing.of(found).median_ms for name, found in samples.items()}
        results += [
            {
                "batch": batch,
                "name": name,
                "median_ms": medians[name],
                "tokens_per_second": 1e3 * batch * options.new / medians[name],
                "speed_to_transformers": medians["transformers"] / medians[name],
                "samples_ms": [1e3 * sample.seconds for sample in samples[name]],
            }
            for name in contenders
        ]
    return {
        "schema_version": 1,
        "benchmark": "generation",
        "config": {key: value for key, value in asdict(options).items() if key != "output"},
        "parameters": parameters,
        "environment": harness.environment("benchmarks.generation", device),
        "transformers": __import__("transformers").__version__,
        "time_is": "between CUDA events" if device.type == "cuda" else "CPU time of the process, one thread",
        "results": results,
    }


def print_table(record: dict[str, Any]) -> None:
    """The record as a table for the terminal."""
    config = record["config"]
    print(f"\n{record['parameters'] / 1e6:.0f}M parameters on {record['environment']['device']}", end="; ")
    print(f"prompts of {config['prompt']}, {config['new']} new tokens; medians of {config['rounds']} runs")
    print(f"time is {record['time_is']}")
    print(f"{'batch':>5}  {'':28}{'ms':>9}{'tokens/s':>10}{'speed / transformers':>22}")
    for row in record["results"]:
        print(
            f"{row['batch']:5}  {row['name']:28}{row['median_ms']:9.0f}{row['tokens_per_second']:10.1f}"
            f"{row['speed_to_transformers']:22.2f}"
        )


def main() -> None:
    """Read the flags, measure, print and write."""
    options = tyro.cli(Options, prog="benchmarks.generation")
    torch.set_num_threads(1)
    device = torch.device(options.device)
    record = measure(options, device)
    path = options.output or Path(f"benchmarks/results/generation_{device.type}.json")
    harness.write_json(path, record)
    print_table(record)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
