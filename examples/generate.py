"""Continue prompts with a Hugging Face directory, or with a checkpoint of examples/pretrain.py, at any tp.

python examples/generate.py runs/<name>/checkpoints/step_00000200 "def main("
torchrun --nproc-per-node 2 examples/generate.py Llama-3.2-1B "Once upon a time" "The answer is" --temperature 0.7
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tpformer
from tpformer import Mesh
from tpformer.data import Tokenizer, find_tokenizer, load_tokenizer


def main(arguments: list[str]) -> int:
    """Open, generate, print; the exit code."""
    options = parse(arguments)
    mesh = Mesh.create(tp=int(os.environ.get("WORLD_SIZE", "1")), device=options.device)
    chief = mesh.world.rank == 0
    try:
        dtype = getattr(torch, options.dtype) if options.dtype else None
        model = tpformer.load_pretrained(options.directory, mesh=mesh, dtype=dtype)
        tokenizer = load_tokenizer(find_tokenizer(options.directory))
        tokens, mask = batch([tokenizer.prompt(text) for text in options.prompts], mesh.device)
        one = len(options.prompts) == 1
        writer = Writer(tokenizer, options.prompts[0])
        found = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=options.max_new_tokens,
            stream=writer if chief and one else None,
            progress=not one,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            repetition_penalty=options.repetition_penalty,
            stop_tokens=stop_tokens(options.directory),
            seed=options.seed,
        )
    except (ValueError, OSError, ImportError) as error:  # of the files and options: the same on every rank
        if chief:
            print(f"generate.py: error: {error}", file=sys.stderr)
        return 2
    if chief:
        rows = found[:, tokens.shape[1] :].tolist()
        print(
            writer.rest()
            if one
            else "\n".join(f"\n{p}{text(tokenizer, r)}" for p, r in zip(options.prompts, rows, strict=True))
        )
    mesh.close()
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="with config.json and safetensors")
    parser.add_argument("prompts", nargs="+", help="texts to continue; together, if several")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="at most so many (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token (%(default)s)")
    parser.add_argument("--top-k", type=int, help="only of the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="only of the likeliest tokens that have this probability together")
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1: fewer repetitions (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same tokens at any tp for one seed (%(default)s)")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="by default the files'")
    parser.add_argument("--device", choices=["cpu"], help="by default GPUs where there are any")
    return parser.parse_args(arguments)


def stop_tokens(directory: Path) -> tuple[int, ...]:
    """The tokens by which a text of this model ends, if its files say any."""
    for name in ("generation_config.json", "config.json"):
        if (directory / name).exists():
            found: Any = json.loads((directory / name).read_text()).get("eos_token_id")
            if found is not None:
                return tuple(found) if isinstance(found, list) else (found,)
    return ()


def batch(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens, padded to the left, and the mask that says which are; both int64 (b, s).

    Raises ValueError for a prompt without tokens.
    """
    if not all(prompts):
        raise ValueError(f"prompt {prompts.index([]) + 1} of {len(prompts)} has no token: give some text to continue")
    length = max(map(len, prompts))
    tokens = torch.tensor([[0] * (length - len(ids)) + ids for ids in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    return tokens, mask


def text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """What the ids say; a model's vocabulary may have more than its tokenizer's."""
    return tokenizer.decode([token for token in ids if token < tokenizer.vocab_size])


class Writer:
    """Prints a prompt and its continuation as that comes, each time what is new."""

    def __init__(self, tokenizer: Tokenizer, prompt: str):
        self._tokenizer, self._prompt, self._ids, self._printed = tokenizer, prompt, list[int](), 0

    def __call__(self, column: Tensor) -> None:
        self._ids += column.tolist()
        new = self.rest()
        if not new.endswith("\ufffd"):  # in the middle of a character
            print(new, end="", flush=True)
            self._printed += len(new)

    def rest(self) -> str:
        """What has not been printed."""
        return (self._prompt + text(self._tokenizer, self._ids))[self._printed :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
