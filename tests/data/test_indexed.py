import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tpformer.data import indexed

DOCUMENTS = [[1, 2, 3], [40000], [7, 65000]]


def by_hand(prefix: Path, documents: list[list[int]], code: int, letter: str, modes: bytes = b"") -> None:
    """The pair as Megatron's layout describes it, written with struct only."""
    size = struct.calcsize("<" + letter)
    lengths = [len(document) for document in documents]
    pointers = [size * sum(lengths[:i]) for i in range(len(lengths))]
    count = len(documents)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, count, count + 1)
    index += struct.pack(f"<{count}i{count}q{count + 1}q", *lengths, *pointers, *range(count + 1)) + modes
    ids = [token for document in documents for token in document]
    prefix.with_name(prefix.name + ".idx").write_bytes(index)
    prefix.with_name(prefix.name + ".bin").write_bytes(struct.pack(f"<{len(ids)}{letter}", *ids))


@pytest.mark.parametrize(("vocab_size", "code", "letter"), [(65001, 8, "H"), (65499, 8, "H"), (65500, 4, "i")])
def test_write_indexed_equals_the_layout_by_hand_byte_for_byte(
    tmp_path: Path, vocab_size: int, code: int, letter: str
) -> None:
    by_hand(tmp_path / "peer", DOCUMENTS, code, letter)
    kinds: list[Callable[[list[int]], npt.ArrayLike]] = [
        list,
        np.array,
        lambda ids: np.array(ids, dtype=np.uint16),
    ]
    indexed.write_indexed(
        tmp_path / "new" / "ours", (kind(ids) for kind, ids in zip(kinds, DOCUMENTS, strict=True)), vocab_size
    )
    for ending in (".bin", ".idx"):
        assert (tmp_path / "new" / f"ours{ending}").read_bytes() == (tmp_path / f"peer{ending}").read_bytes()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["ours.bin", "ours.idx"]


@pytest.mark.parametrize(("code", "letter"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")])
@pytest.mark.parametrize("modes", [b"", b"\0\1\0"])
def test_read_indexed_of_every_integer_type(tmp_path: Path, code: int, letter: str, modes: bytes) -> None:
    documents = [[1, 2, 3], [], [100, 5]]
    by_hand(tmp_path / "v1.2", documents, code, letter, modes)  # a dot in the prefix is no ending
    for name in ("v1.2", "v1.2.bin", "v1.2.idx"):
        data = indexed.read_indexed(str(tmp_path / name))
        assert data.tokens.tolist() == [1, 2, 3, 100, 5]
        assert data.tokens.dtype == np.dtype("<" + letter)
        assert [data.sequence(i).tolist() for i in range(3)] == documents
        assert data.sequence_lengths.dtype == np.int32 and data.sequence_lengths.tolist() == [3, 0, 2]
        assert data.sequence_pointers.dtype == np.int64
        assert data.document_indices.dtype == np.int64 and data.document_indices.tolist() == [0, 1, 2, 3]
    with pytest.raises(IndexError):
        data.sequence(3)
    with pytest.raises(ValueError, match="read-only"):
        data.tokens[0] = 9


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ3i3q3q", 1, 8, 3, 3, 1, 2, 1, 0, 2, 6, 0, 2, 3)
    (tmp_path / "d.idx").write_bytes(index)
    (tmp_path / "d.bin").write_bytes(struct.pack("<4H", 5, 6, 7, 8))
    data = indexed.read_indexed(tmp_path / "d")
    assert data.document_indices.tolist() == [0, 2, 3] and data.sequence(1).tolist() == [6, 7]


# Offsets in the .idx of three sequences: lengths at 34, pointers at 46, document indices at 70; 102 bytes in all.
BROKEN = {
    "magic": (0, b"NUMPY", r"d\.idx begins with b'NUMPYDX.*expected b'MMIDIDX"),
    "version": (9, b"\2", r"d\.idx has version 2, expected 1"),
    "float32": (17, b"\7", r"d\.idx has dtype code 7, expected an integer type, one of \[1, 2, 3, 4, 5, 8\]"),
    "dtype": (17, b"\0", r"d\.idx has dtype code 0"),
    "wider dtype": (17, b"\4", r"d\.idx puts sequence 1 at byte 6, expected 12"),
    "count": (
        18,
        struct.pack("<Q", 2**60),
        rf"d\.idx is 102 bytes, but its {2**60} sequences and 4 .* take \d+",
    ),
    "fewer": (
        18,
        struct.pack("<QQ", 2, 4),
        r"d\.idx is 102 bytes, but its 2 sequences and 4 .* take 90 bytes",
    ),
    "more documents": (26, struct.pack("<Q", 2**61), r"d\.idx is 102 bytes"),
    "length": (34, struct.pack("<i", 4), r"d\.idx puts sequence 1 at byte 6, expected 8"),
    "last length": (
        42,
        struct.pack("<i", 9),
        r"d\.bin is 12 bytes, but d\.idx promises 26 \(13 tokens of uint16\)",
    ),
    "negative length": (38, struct.pack("<i", -1), r"d\.idx has length -1 for sequence 1"),
    "pointer": (54, struct.pack("<q", 2**40), rf"d\.idx puts sequence 1 at byte {2**40}, expected 6"),
    "first pointer": (46, struct.pack("<q", -2), r"d\.idx puts sequence 0 at byte -2, expected 0"),
    "last document": (94, struct.pack("<q", 7), r"d\.idx has document indices from 0 to 7, expected 0 to 3"),
    "document order": (78, struct.pack("<q", 3), r"d\.idx has document indices that fall after number 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_read_indexed_refuses_a_corrupt_index(tmp_path: Path, name: str) -> None:
    by_hand(tmp_path / "d", DOCUMENTS, 8, "H")
    offset, wrong, message = BROKEN[name]
    index = bytearray((tmp_path / "d.idx").read_bytes())
    assert len(index) == 102
    index[offset : offset + len(wrong)] = wrong
    (tmp_path / "d.idx").write_bytes(index)
    with pytest.raises(ValueError, match=message):
        indexed.read_indexed(tmp_path / "d")


def test_read_indexed_refuses_every_other_length_of_either_file(tmp_path: Path) -> None:
    by_hand(tmp_path / "d", DOCUMENTS, 8, "H")
    for ending, whole in ((".idx", 102), (".bin", 12)):
        path = tmp_path / f"d{ending}"
        content = path.read_bytes()
        for size in range(whole + 8):
            if size in (whole, 105):  # 102 + 3 is a multimodal index
                continue
            path.write_bytes((content + bytes(8))[:size])
            with pytest.raises(
                ValueError, match=rf"d\{ending} is {size} bytes, but .*{34 if size < 34 < whole else whole}"
            ):
                indexed.read_indexed(tmp_path / "d")
        path.write_bytes(content)
    assert indexed.read_indexed(tmp_path / "d").tokens[-1] == 65000


def test_read_indexed_refuses_missing_and_empty_data(tmp_path: Path) -> None:
    by_hand(tmp_path / "zero", [[]], 8, "H")
    with pytest.raises(ValueError, match=r"zero\.bin is 0 bytes"):
        indexed.read_indexed(tmp_path / "zero")
    by_hand(tmp_path / "none", [], 8, "H")
    with pytest.raises(ValueError, match=r"none\.idx has 0 sequences and 1 document indices"):
        indexed.read_indexed(tmp_path / "none")
    (tmp_path / "zero.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*zero\.bin: Megatron data is zero\.bin beside zero\.idx"):
        indexed.read_indexed(tmp_path / "zero")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], r"document 1 has shape \(0,\)"),
        ([[1, 2]], r"document 1 has shape \(1, 2\)"),
        ([1.0], r"document 1 has shape \(1,\) and type float64"),
        ([3, 100, 3], r"document 1 holds id 100 at position 1, but the vocabulary has 100 ids"),
        ([3, -1], r"document 1 holds id -1 at position 1"),
    ],
)
def test_write_indexed_refuses_a_document_and_leaves_nothing(
    tmp_path: Path, document: list[object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        indexed.write_indexed(tmp_path / "d", [[1], document], 100)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="no documents to write"):
        indexed.write_indexed(tmp_path / "d", [], 100)
    with pytest.raises(ValueError, match="vocab_size = 0"):
        indexed.write_indexed(tmp_path / "d", [[1]], 0)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_fails_leaves_the_previous_pair_whole(tmp_path: Path) -> None:
    def failing() -> Iterator[list[int]]:
        yield [9, 9, 9]
        assert len(list(tmp_path.glob("d.bin.*.tmp"))) == 1  # it is writing beside the old pair
        assert indexed.read_indexed(tmp_path / "d").tokens.tolist() == [1, 2]
        raise KeyboardInterrupt

    indexed.write_indexed(tmp_path / "d", [[1, 2]], 100)
    with pytest.raises(KeyboardInterrupt):
        indexed.write_indexed(tmp_path / "d", failing(), 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx"]
    assert indexed.read_indexed(tmp_path / "d").tokens.tolist() == [1, 2]
    indexed.write_indexed(tmp_path / "d", [[3]], 100)
    assert indexed.read_indexed(tmp_path / "d").tokens.tolist() == [3]


def test_a_writer_killed_between_its_renames_never_leaves_a_readable_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace
    for survived in range(2):
        indexed.write_indexed(tmp_path / "d", [[1, 2]], 100)
        calls: list[Path] = []

        def killed(self: Path, target: Path, calls: list[Path] = calls, survived: int = survived) -> Path:
            calls.append(target)
            if len(calls) > survived:
                raise KeyboardInterrupt
            return replace(self, target)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Path, "replace", killed)
            indexed.write_indexed(tmp_path / "d", [[8, 9]], 100)
        for name in ("d", "d.bin", "d.idx"):
            with pytest.raises(FileNotFoundError):
                indexed.open_tokens(tmp_path / name)


def test_write_indexed_streams(tmp_path: Path) -> None:
    alive = 0
    most = 0

    class Document(np.ndarray):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def stream() -> Iterator[np.ndarray]:
        nonlocal alive, most
        for token in range(50):
            document = Document(4, dtype=np.int64)
            document[:] = token
            alive += 1
            most = max(most, alive)
            yield document
            del document

    indexed.write_indexed(tmp_path / "d", stream(), 50)
    assert most <= 3
    assert indexed.read_indexed(tmp_path / "d").tokens.tolist() == [token for token in range(50) for _ in range(4)]


def test_read_nanogpt(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(struct.pack("<3H", 1, 65535, 3))
    assert indexed.read_nanogpt(path).tolist() == [1, 65535, 3]
    assert indexed.read_nanogpt(path).dtype == np.uint16
    for size in (0, 5):
        path.write_bytes(bytes(size))
        with pytest.raises(ValueError, match=rf"train\.bin is {size} bytes, expected a positive multiple of 2"):
            indexed.read_nanogpt(path)
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.bin"):
        indexed.read_nanogpt(tmp_path / "none.bin")


def test_open_tokens_tells_megatron_from_nanogpt(tmp_path: Path) -> None:
    by_hand(tmp_path / "d", [[1, 70000], [2]], 4, "i")
    for name in ("d", "d.bin", "d.idx"):
        assert indexed.open_tokens(tmp_path / name).tolist() == [1, 70000, 2]
    (tmp_path / "d.idx").unlink()
    assert indexed.open_tokens(str(tmp_path / "d.bin")).tolist() == [1, 0, 70000 - 65536, 1, 2, 0]
    for name in ("d", "d.idx", "none.bin", "d.npy"):
        with pytest.raises(FileNotFoundError, match=rf"no tokens at .*{name}: expected Megatron's"):
            indexed.open_tokens(tmp_path / name)


def test_check_vocabulary_names_the_largest_id_and_its_place() -> None:
    tokens = np.arange(3 * 2**20, dtype=np.int32) % 100
    indexed.check_vocabulary(tokens, 100, "corpus")
    tokens[5], tokens[2**20 + 7], tokens[-1] = 100, 300, 200
    with pytest.raises(ValueError, match=rf"corpus holds id 300 at position {2**20 + 7}, .* has 100 ids \(0\.\.99\)"):
        indexed.check_vocabulary(tokens, 100, "corpus")
    indexed.check_vocabulary(tokens, 301, "corpus")
    tokens[2**21] = -2
    with pytest.raises(ValueError, match=rf"corpus holds id -2 at position {2**21}"):
        indexed.check_vocabulary(tokens, 301, "corpus")
    with pytest.raises(ValueError, match="corpus holds no tokens"):
        indexed.check_vocabulary(tokens[:0], 301, "corpus")


def test_check_vocabulary_above_the_limit_looks_at_both_ends_and_less_than_all() -> None:
    clean = np.zeros(1000, dtype=np.uint16)
    missed = 0
    for position in range(1000):
        tokens = clean.copy()
        tokens[position] = 50
        try:
            indexed.check_vocabulary(tokens, 50, "corpus", limit=100)
        except ValueError as error:
            assert f"position {position}," in str(error)
        else:
            missed += 1
            assert 0 < position < 999
    assert missed == 900
