"""Open a Hugging Face directory, train on, and write one that transformers opens.

torchrun --nproc-per-node 2 examples/finetune_from_hf.py Llama-3.2-1B out --data 'notes/**/*.txt' --steps 200
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import tpformer
from tpformer import Key, Mesh
from tpformer.collectives import together
from tpformer.data import TokenSampler, find_tokenizer
from tpformer.parallel.data import GradientBuckets
from tpformer.train.config import DataConfig
from tpformer.train.corpus import Corpus, load_corpus
from tpformer.train.optimizer import Optimizer
from tpformer.train.schedule import OptimizerConfig, learning_rate
from tpformer.train.step import StepOptions, train_step


def main(arguments: list[str]) -> int:
    """Open, train, write, and have transformers continue a prompt; the exit code."""
    options = parse(arguments)
    mesh = Mesh.create(tp=int(os.environ.get("WORLD_SIZE", "1")), device=options.device)
    chief = mesh.world.rank == 0
    try:
        together(lambda: check_free(options.output), mesh.world)  # before, not after, the training
        # fp32 to learn in; the optimizer keeps it, and rounds it to what the model computes in
        model = tpformer.load_pretrained(options.model, mesh=mesh, dtype=torch.float32)
        longest = model.config.max_seq_len
        if options.seq_len > longest:
            raise ValueError(f"--seq-len ({options.seq_len}) must be at most the model's max_seq_len ({longest})")
        data = DataConfig(data=options.data, tokenizer=find_tokenizer(options.model), seq_len=options.seq_len)
        corpus = together(lambda: load_corpus(data, model.config.vocab_size, progress=chief), mesh.world)
        train(model, corpus, options)
        tpformer.save_pretrained(model, options.output, like=options.model)
    except (ValueError, OSError, ImportError) as error:  # raised on every rank
        if chief:
            print(f"finetune_from_hf.py: error: {error}", file=sys.stderr)
        return 2
    if chief and corpus.tokenizer is not None:
        ids = continue_with_transformers(options.output, corpus.tokenizer.prompt(options.prompt))
        known = [token for token in ids if token < corpus.tokenizer.vocab_size]  # the model's may be padded
        print(f"{options.output}, opened by transformers:\n{corpus.tokenizer.decode(known)}")
    mesh.close()
    return 0


def check_free(output: Path) -> None:
    """Raises ValueError if there is something in the output already."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} is not empty: give another")


def train(model: Any, corpus: Corpus, options: argparse.Namespace) -> None:
    """Every rank takes the same steps on the same samples; each holds and updates its part of the weights."""
    chief = model.mesh.world.rank == 0
    config = OptimizerConfig(lr=options.lr, warmup_steps=options.steps // 10)
    optimizer = Optimizer(model, model.mesh, config, torch.bfloat16 if options.bf16 else None)
    gradients = GradientBuckets(model, model.mesh)
    sampler = TokenSampler(corpus.train, options.seq_len, 0, corpus.vocab_size)
    with tqdm(range(options.steps), unit="step", disable=not chief) as bar:
        for step in bar:
            samples = sampler.samples(step * options.batch_size, options.batch_size)
            key = Key(0).fold("dropout", step)  # what dropout config.json says; the same masks at any tp
            now = StepOptions(options.batch_size, learning_rate(step, options.steps, config), key)
            report = train_step(model, gradients, optimizer, samples, now)
            bar.set_postfix(loss=f"{report.loss:.3f}")
    model.to(torch.float32)  # where it computed in bf16: what it has learned is in the optimizer's weights
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(optimizer.masters[name])


def continue_with_transformers(directory: Path, prompt: list[int]) -> list[int]:
    """What transformers makes of the directory: no converter, no option."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    return model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0].tolist()


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face directory: config.json, safetensors, tokenizer.json")
    parser.add_argument("output", type=Path, help="the directory to write")
    parser.add_argument("--data", default="python", help="text: files, directories, globs (%(default)s: its library)")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="samples in a step (%(default)s)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens in a sample (%(default)s)")
    parser.add_argument("--lr", type=float, default=2e-5, help="peak learning rate (%(default)s)")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16; weights stay fp32 in the optimizer")
    parser.add_argument("--prompt", default="def ", help="what transformers continues at the end")
    parser.add_argument("--device", choices=["cpu"], help="by default GPUs where there are any")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
