"""From text files to one flat array of token ids."""

import glob
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from tpformer.data.indexed import Tokens

TEXT_ENDINGS = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".log", ".jsonl", ".json", ".csv", ".tsv", ".xml", ".html"),
    *(".css", ".toml", ".yaml", ".yml", ".ini", ".cfg", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp"),
    *(".cu", ".cuh", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh", ".sql", ".lua", ".r", ".jl"),
)
END_OF_TEXT_NAMES = (
    "<|endoftext|>",  # GPT-2, Qwen
    "<|end_of_text|>",  # Llama 3
    "</s>",  # Llama 2, Mistral, T5
    "<eos>",  # Gemma
    "<｜end▁of▁sentence｜>",  # DeepSeek; its bars and underscores are not ASCII
    "[EOS]",
    "[SEP]",  # BERT
)


def find_files(data: str) -> list[Path]:
    """The text files that `data` names, sorted by path.

    `data` is a file (any ending), a directory (searched recursively for the endings in TEXT_ENDINGS, hidden
    files and directories left out) or a glob (`**` is recursive; any ending). A text file is one that can be
    read and has no NUL byte in its first KiB. Raises FileNotFoundError when a plain path does not exist,
    ValueError when what is there holds no text file.
    """
    path = Path(data)
    if data and path.is_file():
        kind, found = "file", [path]
    elif data and path.is_dir():
        kind = "directory"
        inside = (file.relative_to(path) for file in path.rglob("*") if file.suffix.lower() in TEXT_ENDINGS)
        found = [path / name for name in inside if not any(part.startswith(".") for part in name.parts)]
    elif glob.has_magic(data):
        kind, found = "glob", [Path(name) for name in set(glob.glob(data, recursive=True))]
    else:
        raise FileNotFoundError(f"no file or directory {data!r}: give a text file, a directory or a glob")
    texts = sorted((file for file in found if _is_text(file)), key=Path.as_posix)
    if not texts:
        raise ValueError(
            f"no readable text file in the {kind} {data!r} ({len(found)} looked at): a directory is searched for "
            ".txt, .md, .py, .jsonl and the like, name other endings by a glob; token files (.bin) go to open_tokens"
        )
    return texts


def _is_text(file: Path) -> bool:
    if not file.is_file() or not os.access(file, os.R_OK):
        return False
    with file.open("rb") as opened:
        return b"\0" not in opened.read(1024)


def python_library_files() -> list[Path]:
    """The .py files of this Python's own standard library: real text that every machine has.

    Tests, installed packages and the build's own `_sysconfigdata` are left out. Sorted by the path relative
    to the library, so that two machines with one Python version agree. Raises FileNotFoundError when the
    library is not kept as files.
    """
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    found: list[Path] = []
    for folder, folders, names in os.walk(library):
        folders[:] = [name for name in folders if name not in left_out]  # not even looked into: they are large
        found += [
            Path(folder, name)
            for name in names
            if name.endswith(".py") and not name.startswith("_sysconfigdata")  # which holds local paths
        ]
    if not found:
        raise FileNotFoundError(f"no .py files in Python's library {library}: give text files of your own")
    return sorted(found, key=lambda file: file.relative_to(library).as_posix())


def documents(path: Path) -> Iterator[str]:
    """The documents of one file: the "text" of each non-empty .jsonl line, else the whole file as UTF-8.

    Bytes that are not UTF-8 become U+FFFD. Raises ValueError naming file and line when a .jsonl line is not
    a JSON object with a string under "text".
    """
    if path.suffix.lower() != ".jsonl":
        yield path.read_bytes().decode("utf-8", errors="replace")
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _text_of_line(line.decode("utf-8", errors="replace"), f"{path}, line {number}")


def _text_of_line(line: str, where: str) -> str:
    try:
        record = json.loads(line.removeprefix("\ufeff"))
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}): a .jsonl file has one JSON object per line") from error
    text = record.get("text") if isinstance(record, dict) else None
    if isinstance(text, str):
        # JSON may spell half of a surrogate pair ("\ud800"), which no tokenizer can encode.
        return text.encode("utf-8", errors="replace").decode("utf-8")
    raise ValueError(f'{where} has no string under "text": each line must be like {{"text": "..."}}')


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, and 256 for the end of a document: needs no file."""

    vocab_size = 257
    eos: int | None = 256
    dtype: npt.DTypeLike = np.uint16

    def encode(self, text: str) -> npt.NDArray[np.uint16]:
        """The ids of `text`, shape (bytes of the text,); no eos is added."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(np.uint16)

    def encode_batch(self, texts: list[str]) -> list[Tokens]:
        """The ids of each text."""
        return [self.encode(text) for text in texts]

    def prompt(self, text: str) -> list[int]:
        """The ids of a text that a model is to continue."""
        return self.encode(text).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, eos dropped, broken UTF-8 as U+FFFD; ValueError for an id outside 0..256."""
        kept = _ids_without_eos(ids, self.eos, self.vocab_size)
        return bytes(kept).decode("utf-8", errors="replace")


class FileTokenizer:
    """A Hugging Face tokenizer.json.

    `vocab_size` is the largest id + 1; `eos` is the id of the first name in END_OF_TEXT_NAMES that the
    vocabulary has, or None. Raises FileNotFoundError for a missing file, ValueError for a malformed one,
    ImportError when the package `tokenizers` is missing.
    """

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f'no tokenizer file {str(path)!r}: give "byte" or a path to a tokenizer.json')
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError(f"{path} needs the package tokenizers: pip install tokenizers") from error
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"{path} is not a Hugging Face tokenizer.json: {error}") from error
        # Both are kept in the file and would cut or pad documents without a word.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        names: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        if not names:
            raise ValueError(f"{path} has an empty vocabulary: give the tokenizer.json of a trained tokenizer")
        self.vocab_size = max(names.values()) + 1  # ids may have holes, so counting names is not enough
        self.eos: int | None = next((names[name] for name in END_OF_TEXT_NAMES if name in names), None)
        self.dtype: npt.DTypeLike = np.uint16 if self.vocab_size <= 65536 else np.int32

    def encode(self, text: str) -> Tokens:
        """The ids of `text` without the tokenizer's own begin and end marks; uint16, or int32 above 65536."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[Tokens]:
        """The ids of each text, encoded on all cores."""
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def prompt(self, text: str) -> list[int]:
        """The ids of a text that a model is to continue, with the mark that the tokenizer begins a text by."""
        return list(self._tokenizer.encode(text, add_special_tokens=True).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens dropped; ValueError for an id outside the vocabulary."""
        kept = _ids_without_eos(ids, self.eos, self.vocab_size)
        return str(self._tokenizer.decode(kept, skip_special_tokens=True))


Tokenizer: TypeAlias = ByteTokenizer | FileTokenizer


def _ids_without_eos(ids: Sequence[int], eos: int | None, vocab_size: int) -> list[int]:
    kept = [int(token) for token in ids]
    for token in kept:
        if not 0 <= token < vocab_size:
            raise ValueError(f"cannot decode id {token}: this tokenizer has the ids 0..{vocab_size - 1}")
    return [token for token in kept if token != eos]


def find_tokenizer(directory: Path) -> str:
    """What `load_tokenizer` loads for a model's directory: its tokenizer.json, or bytes where there is none."""
    path = directory / "tokenizer.json"
    return str(path) if path.exists() else "byte"


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `spec` names: "byte", or a path to a tokenizer.json. Raises as FileTokenizer does."""
    return ByteTokenizer() if spec == "byte" else FileTokenizer(spec)


def tokenize(files: list[Path], tokenizer: Tokenizer, *, progress: bool = False) -> Tokens:
    """All documents of `files` in order as one 1-D array of ids, eos after each where there is one.

    Empty documents are left out. `progress` shows a bar over the files when it takes more than 2 seconds.
    Raises ValueError when there is no text at all.
    """
    end = np.array([] if tokenizer.eos is None else [tokenizer.eos], dtype=tokenizer.dtype)
    parts: list[Tokens] = []
    for texts in _batches(tqdm(files, desc="tokenize", unit="file", disable=not progress, delay=2)):
        for ids in tokenizer.encode_batch(texts):
            if len(ids):
                parts += [ids, end]
    if not parts:
        raise ValueError(f"no text in {_summary(files)}: every document is empty, give other files")
    return np.concatenate(parts)


def _batches(files: Iterable[Path], characters: int = 4_000_000) -> Iterator[list[str]]:
    """Documents grouped so that the tokenizer can use its threads, without holding the whole corpus."""
    texts: list[str] = []
    held = 0
    for file in files:
        for text in documents(file):
            texts.append(text)
            held += len(text)
            if held >= characters:
                yield texts
                texts, held = [], 0
    if texts:
        yield texts


def _summary(files: list[Path]) -> str:
    first = ", ".join(str(file) for file in files[:3])
    return first + (f" and {len(files) - 3} more files" if len(files) > 3 else "") if files else "an empty list"


def split_files(files: list[Path], every: int = 20) -> tuple[list[Path], list[Path]]:
    """Files to train on and files held out: each `every`-th of the list as given, at least one of two files.

    With fewer than two files nothing is held out: the caller splits tokens instead. Raises ValueError when
    every < 2.
    """
    if every < 2:
        raise ValueError(f"every = {every} leaves no file to train on: give 2 or more")
    if len(files) < 2:
        return list(files), []
    step = min(every, len(files))
    held_out = files[step - 1 :: step]
    return [file for position, file in enumerate(files) if (position + 1) % step], held_out


def unigram_entropy(tokens: Tokens) -> float:
    """Nats per token of the empirical unigram distribution: the loss of a model that knows only frequencies.

    Ids must be non-negative (`check_vocabulary`). Raises ValueError when there are no tokens.
    """
    if len(tokens) == 0:
        raise ValueError("the entropy of 0 tokens is not defined: give at least one token")
    counts = np.zeros(0, dtype=np.int64)
    chunk = 2**20  # bincount turns what it reads into int64: never the whole of a mapped file at once
    for start in range(0, len(tokens), chunk):
        part = np.bincount(tokens[start : start + chunk], minlength=len(counts))
        part[: len(counts)] += counts
        counts = part
    shares = counts[counts > 0] / len(tokens)
    return float(-(shares * np.log(shares)).sum())
