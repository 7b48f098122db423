"""Files of token ids: Megatron's pair prefix.bin + prefix.idx, and nanoGPT's headerless .bin.

prefix.idx, little-endian without padding (S sequences, D document indices):

    offset        bytes   content
    0             9       b"MMIDIDX\\0\\0"
    9             8       uint64 version = 1
    17            1       uint8 dtype code
    18            8       uint64 S
    26            8       uint64 D
    34            4 S     int32 sequence_lengths, in tokens
    34 + 4 S      8 S     int64 sequence_pointers, byte offsets into prefix.bin
    34 + 12 S     8 D     int64 document_indices, the sequences where documents begin: 0, ..., S
    34 + 12 S + 8 D  S    int8 modes, in multimodal files only (not read)

prefix.bin is the ids of all sequences back to back.
"""

import os
import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

Tokens: TypeAlias = npt.NDArray[np.integer[Any]]  # 1-D

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document indices
TOKEN_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats
CHUNK = 2**20


@dataclass(frozen=True, eq=False)
class IndexedTokens:
    """A Megatron pair of files, mapped read-only.

    `tokens` is all ids (1-D); `sequence_lengths` int32 [S] in tokens, `sequence_pointers` int64 [S] in bytes,
    `document_indices` int64 [D], the number of the first sequence of each document and S at the end.
    """

    tokens: np.memmap[Any, np.dtype[np.integer[Any]]]
    sequence_lengths: npt.NDArray[np.int32]
    sequence_pointers: npt.NDArray[np.int64]
    document_indices: npt.NDArray[np.int64]

    def sequence(self, i: int) -> Tokens:
        """The ids of sequence i, shape (sequence_lengths[i],); IndexError outside the S sequences."""
        start = int(self.sequence_pointers[i]) // self.tokens.itemsize
        return self.tokens[start : start + int(self.sequence_lengths[i])]


def read_indexed(prefix: str | Path) -> IndexedTokens:
    """Map prefix.bin and prefix.idx (a path with either ending is taken too) after checking every byte count.

    Raises FileNotFoundError when one is missing, ValueError naming file, expected and found values when the
    .idx is malformed or the two do not belong together.
    """
    bin_path, idx_path = _pair(prefix)
    for path in (idx_path, bin_path):
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}: Megatron data is {bin_path.name} beside {idx_path.name}")
    dtype, sequences, indices = _read_header(idx_path)

    def mapped(kind: str, offset: int, count: int) -> Any:
        return np.memmap(idx_path, dtype=kind, mode="r", offset=offset, shape=(count,))

    lengths = mapped("<i4", HEADER.size, sequences)
    pointers = mapped("<i8", HEADER.size + 4 * sequences, sequences)
    documents = mapped("<i8", HEADER.size + 12 * sequences, indices)
    _check_documents(idx_path, documents, sequences)
    promised = _check_sequences(idx_path, lengths, pointers, dtype.itemsize)
    size = bin_path.stat().st_size
    if size != promised:
        raise ValueError(
            f"{bin_path} is {size} bytes, but {idx_path.name} promises {promised} "
            f"({promised // dtype.itemsize} tokens of {dtype.name}): truncated or not its partner, copy both again"
        )
    if promised == 0:
        raise ValueError(f"{bin_path} is 0 bytes: it holds no tokens, write it again")
    return IndexedTokens(np.memmap(bin_path, dtype=dtype, mode="r"), lengths, pointers, documents)


def _pair(prefix: str | Path) -> tuple[Path, Path]:
    path = Path(prefix)
    name = str(path.with_suffix("") if path.suffix in (".bin", ".idx") else path)
    return Path(name + ".bin"), Path(name + ".idx")


def _read_header(path: Path) -> tuple[np.dtype[np.integer[Any]], int, int]:
    """Token dtype, S and D; the counts are compared with the file's size before anyone allocates by them."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise ValueError(f"{path} is {size} bytes, but the header alone is {HEADER.size}: truncated, copy it again")
    magic, version, code, sequences, indices = HEADER.unpack(header)
    if magic != MAGIC:
        raise ValueError(f"{path} begins with {magic!r}, expected {MAGIC!r}: not a Megatron index file")
    if version != 1:
        raise ValueError(f"{path} has version {version}, expected 1: write it again with Megatron-Core")
    if code not in TOKEN_DTYPES:
        raise ValueError(f"{path} has dtype code {code}, expected an integer type, one of {sorted(TOKEN_DTYPES)}")
    expected = HEADER.size + 12 * sequences + 8 * indices
    if size not in (expected, expected + sequences):  # with a multimodal file's byte per sequence
        raise ValueError(
            f"{path} is {size} bytes, but its {sequences} sequences and {indices} document indices take "
            f"{expected} bytes: truncated or corrupt, copy it again"
        )
    if sequences == 0 or indices == 0:
        raise ValueError(f"{path} has {sequences} sequences and {indices} document indices, expected some of each")
    return np.dtype(TOKEN_DTYPES[code]), sequences, indices


def _check_documents(path: Path, documents: npt.NDArray[np.int64], sequences: int) -> None:
    if documents[0] != 0 or documents[-1] != sequences:
        raise ValueError(
            f"{path} has document indices from {documents[0]} to {documents[-1]}, expected 0 to {sequences}: corrupt"
        )
    for start in range(0, len(documents), CHUNK):
        falls = np.flatnonzero(np.diff(documents[start : start + CHUNK + 1]) < 0)
        if falls.size:
            raise ValueError(f"{path} has document indices that fall after number {start + falls[0]}: corrupt")


def _check_sequences(path: Path, lengths: npt.NDArray[np.int32], pointers: npt.NDArray[np.int64], itemsize: int) -> int:
    """The bytes that all sequences take, after checking that they lie back to back from byte 0."""
    total = 0
    for start in range(0, len(lengths), CHUNK):
        sizes = lengths[start : start + CHUNK].astype(np.int64) * itemsize
        negative = np.flatnonzero(sizes < 0)
        if negative.size:
            bad = start + int(negative[0])
            raise ValueError(f"{path} has length {lengths[bad]} for sequence {bad}, expected 0 or more: corrupt")
        ends = total + np.cumsum(sizes)
        wrong = np.flatnonzero(pointers[start : start + CHUNK] != ends - sizes)
        if wrong.size:
            bad = start + int(wrong[0])
            should = ends[wrong[0]] - sizes[wrong[0]]
            raise ValueError(f"{path} puts sequence {bad} at byte {pointers[bad]}, expected {should}: corrupt")
        total = int(ends[-1])
    return total


def write_indexed(prefix: str | Path, documents: Iterable[npt.ArrayLike], vocab_size: int) -> None:
    """Write Megatron's prefix.bin and prefix.idx, one sequence per document of ids.

    Ids are stored as uint16 if vocab_size < 65500, else int32, as Megatron does. Documents are taken one at a
    time, and both files appear only when complete. Raises ValueError for a document that is not a non-empty
    1-D list of integers in 0..vocab_size - 1, and when there are no documents.
    """
    if not 1 <= vocab_size <= 2**31:
        raise ValueError(f"vocab_size = {vocab_size} is outside 1..2**31: ids are stored as uint16 or int32")
    bin_path, idx_path = _pair(prefix)
    bin_path.parent.mkdir(parents=True, exist_ok=True)
    new_bin, new_idx = (path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in (bin_path, idx_path))
    code = 8 if vocab_size < 65500 else 4
    try:
        with new_bin.open("wb") as file:
            lengths = _write_tokens(file, documents, vocab_size, np.dtype(TOKEN_DTYPES[code]))
        new_idx.write_bytes(_index(code, lengths))
        # Between any two of these steps a reader finds no .bin: an error, never one file's ids under
        # another's index, nor a .bin alone, which open_tokens would take for nanoGPT's.
        bin_path.unlink(missing_ok=True)
        new_idx.replace(idx_path)
        new_bin.replace(bin_path)
    finally:
        new_bin.unlink(missing_ok=True)
        new_idx.unlink(missing_ok=True)


def _write_tokens(
    file: BinaryIO, documents: Iterable[npt.ArrayLike], vocab_size: int, dtype: np.dtype[Any]
) -> npt.NDArray[np.int32]:
    lengths = array("i")
    for number, document in enumerate(documents):
        ids = np.asarray(document)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"document {number} has shape {ids.shape} and type {ids.dtype}, expected a non-empty 1-D list of "
                "integer ids: leave empty documents out"
            )
        if ids.size >= 2**31:
            raise ValueError(f"document {number} has {ids.size} tokens, at most 2**31 - 1 fit: split it")
        check_vocabulary(ids, vocab_size, f"document {number}", limit=ids.size)
        file.write(ids.astype(dtype).tobytes())
        lengths.append(ids.size)
    if not lengths:
        raise ValueError("no documents to write: give at least one")
    return np.array(lengths, dtype="<i4")


def _index(code: int, lengths: npt.NDArray[np.int32]) -> bytes:
    sizes = lengths.astype("<i8") * np.dtype(TOKEN_DTYPES[code]).itemsize
    pointers = np.cumsum(sizes) - sizes
    documents = np.arange(len(lengths) + 1, dtype="<i8")
    header = HEADER.pack(MAGIC, 1, code, len(lengths), len(documents))
    return b"".join([header, lengths.tobytes(), pointers.astype("<i8").tobytes(), documents.tobytes()])


def read_nanogpt(path: str | Path) -> np.memmap[Any, np.dtype[np.uint16]]:
    """Map nanoGPT's headerless file of uint16 ids read-only; ValueError when it is empty or of odd size."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: nanoGPT data is one .bin file of uint16 ids")
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise ValueError(f"{path} is {size} bytes, expected a positive multiple of 2 (uint16 ids): copy it again")
    return np.memmap(path, dtype="<u2", mode="r")


def open_tokens(path: str | Path) -> Tokens:
    """All token ids of a file as a 1-D mapped array.

    X.bin with X.idx beside it, X.idx, or a prefix X with both is Megatron's; X.bin alone is nanoGPT's. Raises
    FileNotFoundError when none of these is there, ValueError when the file is malformed.
    """
    bin_path, idx_path = _pair(path)
    if idx_path.is_file() and (bin_path.is_file() or Path(path) in (bin_path, idx_path)):
        return read_indexed(path).tokens
    if Path(path) == bin_path and bin_path.is_file():
        return read_nanogpt(bin_path)
    raise FileNotFoundError(
        f"no tokens at {path}: expected Megatron's {bin_path.name} with {idx_path.name}, or the path of a "
        "nanoGPT .bin file"
    )


def check_vocabulary(tokens: Tokens, vocab_size: int, source: str, limit: int = 2**28) -> None:
    """Raise ValueError, naming id, position, `vocab_size` and `source`, if an id is not in 0..vocab_size - 1.

    Of more than `limit` tokens it looks at evenly spaced chunks (first and last among them) that hold `limit`
    or fewer; TokenSampler checks each batch again.
    """
    if len(tokens) == 0:
        raise ValueError(f"{source} holds no tokens: give another file")
    if len(tokens) <= limit:
        chunk, starts = CHUNK, list(range(0, len(tokens), CHUNK))
    else:
        chunk = max(1, min(CHUNK, limit // 256))
        starts = [int(start) for start in np.linspace(0, len(tokens) - chunk, max(2, limit // chunk))]
    lowest, highest = (0, 0), (-1, 0)  # (id, position)
    for start in starts:
        part = tokens[start : start + chunk]
        low, high = int(part.argmin()), int(part.argmax())
        lowest = min(lowest, (int(part[low]), start + low))
        highest = max(highest, (int(part[high]), start + high), key=lambda found: found[0])
    for token, position in (highest, lowest):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{source} holds id {token} at position {position}, but the vocabulary has {vocab_size} ids "
                f"(0..{vocab_size - 1}): use the tokenizer it was made with, or a larger vocabulary"
            )
