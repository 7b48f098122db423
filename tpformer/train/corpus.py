"""From what --data and --tokenizer say to arrays of training and held-out tokens."""

from dataclasses import dataclass
from pathlib import Path

from tpformer.data import (
    ByteTokenizer,
    FileTokenizer,
    check_vocabulary,
    find_files,
    load_tokenizer,
    open_tokens,
    python_library_files,
    split_files,
    tokenize,
)
from tpformer.data.indexed import Tokens
from tpformer.train.config import DataConfig


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and tokens held out, of one vocabulary; tokenizer is None for token files."""

    train: Tokens
    validation: Tokens
    vocab_size: int
    tokenizer: ByteTokenizer | FileTokenizer | None


def load_corpus(config: DataConfig, vocab_size: int, *, progress: bool) -> Corpus:
    """Read, tokenise and split the data; vocab_size 0 takes the tokenizer's.

    Raises ValueError or FileNotFoundError, in one line, for data that is missing, empty, damaged, too short for
    one sample on each side, or not of this vocabulary.
    """
    if not 0 < config.validation_part < 1:
        raise ValueError(f"validation_part ({config.validation_part}) must be above 0 and below 1")
    if _is_token_file(config.data):
        if not vocab_size:
            raise ValueError(f"{config.data} holds token ids: say how many there are with --vocab-size")
        tokens = open_tokens(config.data)
        check_vocabulary(tokens, vocab_size, config.data)
        return Corpus(*_split_tokens(tokens, config), vocab_size, None)
    tokenizer = load_tokenizer(config.tokenizer)
    if vocab_size and vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"vocab_size ({vocab_size}) must be at least {tokenizer.vocab_size}, the tokens of {config.tokenizer}"
        )
    files = python_library_files() if config.data == "python" else find_files(config.data)
    train_files, held_out = split_files(files, every=max(2, round(1 / config.validation_part)))
    tokens = tokenize(train_files, tokenizer, progress=progress)
    parts = (tokens, tokenize(held_out, tokenizer)) if held_out else _split_tokens(tokens, config)
    for part, name in zip(parts, ("training", "held-out"), strict=True):
        if len(part) <= config.seq_len:
            raise ValueError(
                f"the {name} part of {config.data} has {len(part)} tokens, fewer than one sample of "
                f"seq_len ({config.seq_len}) + 1: give more text, a smaller --seq-len or another --validation-part"
            )
    return Corpus(*parts, vocab_size or tokenizer.vocab_size, tokenizer)


def _is_token_file(data: str) -> bool:
    path = Path(data)
    return path.suffix in (".bin", ".idx") or (not path.exists() and Path(f"{data}.idx").exists())


def _split_tokens(tokens: Tokens, config: DataConfig) -> tuple[Tokens, Tokens]:
    """The first and the last part of one array; at least one sample each."""
    held_out = max(config.seq_len + 1, round(len(tokens) * config.validation_part))
    if len(tokens) < held_out + config.seq_len + 1:
        raise ValueError(
            f"{config.data} has {len(tokens)} tokens, too few for a sample of seq_len ({config.seq_len}) + 1 to train "
            "on and one to hold out: give more text or a smaller --seq-len"
        )
    return tokens[:-held_out], tokens[-held_out:]
