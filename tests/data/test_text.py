import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from tpformer.data import text


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.md", "sub/deep/c.py", "sub/d.JSONL", "e.bin", ".git/f.txt", "g.odd"):
        write(tmp_path / name, "words")
    write(tmp_path / "h.txt", b"\x00\x01\x02")
    return tmp_path


def names(files: list[Path], root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in files]


def test_find_files_directory_is_recursive_sorted_and_text_only(tree: Path) -> None:
    assert names(text.find_files(str(tree)), tree) == ["a.md", "b.txt", "sub/d.JSONL", "sub/deep/c.py"]


def test_find_files_takes_a_file_and_globs_of_any_ending(tree: Path) -> None:
    assert text.find_files(str(tree / "g.odd")) == [tree / "g.odd"]
    assert names(text.find_files(f"{tree}/*.odd"), tree) == ["g.odd"]
    assert names(text.find_files(f"{tree}/**/**/*.[pt][yx]*"), tree) == ["b.txt", "sub/deep/c.py"]


def test_find_files_says_what_is_not_there(tree: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file or directory '.*nowhere'"):
        text.find_files(str(tree / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no file or directory ''"):
        text.find_files("")
    (tree / "empty").mkdir()
    for data, kind, looked_at in (
        (tree / "empty", "directory", 0),
        (tree / "h.*", "glob", 1),
        (tree / "h.txt", "file", 1),
    ):
        with pytest.raises(ValueError, match=rf"no readable text file in the {kind} '.*' \({looked_at} looked at\)"):
            text.find_files(str(data))


def test_python_library_files_are_the_library_without_its_tests() -> None:
    files = text.python_library_files()
    library = Path(json.__file__).parents[1]
    found = names(files, library)
    assert found == sorted(found) and len(set(found)) == len(found)
    assert {"os.py", "json/decoder.py", "email/message.py"} <= set(found)
    assert not [name for name in found if re.search(r"(^|/)(tests?|idle_test|site-packages|dist-packages)/", name)]


def test_documents_of_text_and_jsonl(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.txt", b"one\r\ntwo \xff")
    assert list(text.documents(plain)) == ["one\r\ntwo \ufffd"]
    lines = b'\xef\xbb\xbf{"text": "one"}\n\n  \n{"id": 3, "text": "two\\n\\ud800"}\r\n{"text": ""}'
    assert list(text.documents(write(tmp_path / "a.jsonl", lines))) == ["one", "two\n?", ""]


@pytest.mark.parametrize("line", ["{oops", "[1]", '{"txt": "a"}', '{"text": 3}'])
def test_documents_names_the_broken_line(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3 (is not JSON|has no string)"):
        list(text.documents(path))


def test_byte_tokenizer_round_trip_and_bad_ids() -> None:
    tokenizer = text.load_tokenizer("byte")
    ids = tokenizer.encode("aé\n\ud800")  # a lone surrogate has no UTF-8
    assert ids.dtype == np.uint16 and ids.tolist() == [97, 0xC3, 0xA9, 10, ord("?")]
    assert tokenizer.vocab_size == 257 and tokenizer.eos == 256
    assert tokenizer.decode([97, 0xC3, 0xA9, 256, 98]) == "aéb"
    assert tokenizer.decode([97, 0xC3]) == "a\ufffd"
    for bad in (257, -1):
        with pytest.raises(ValueError, match=rf"id {bad}: this tokenizer has the ids 0\.\.256"):
            tokenizer.decode([97, bad])


CORPUS = ["the cat sat on the mat", "the dog sat on the log", "naïve café, dogs and logs"]


@pytest.fixture
def peer(tmp_path: Path) -> tokenizers.Tokenizer:
    """A byte-level BPE with an eos, set to cut at 3 tokens and to pad, as published files often are."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS[:2], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def test_file_tokenizer_gives_the_ids_of_the_file_without_its_cuts_and_marks(
    tmp_path: Path, peer: tokenizers.Tokenizer
) -> None:
    ours = text.load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert ours.vocab_size == peer.get_vocab_size() and ours.eos == 1
    for line in CORPUS:
        ids = ours.encode(line)
        assert ids.dtype == np.uint16 and len(ids) > 3
        assert ids.tolist() == peer.encode(line, add_special_tokens=False).ids
        assert ours.decode([0, *ids.tolist(), 1]) == line
    with pytest.raises(ValueError, match=f"id {ours.vocab_size}"):
        ours.decode([ours.vocab_size])


def test_file_tokenizer_with_holes_no_eos_and_many_ids(tmp_path: Path) -> None:
    words = {"cat": 0, "dog": 70000}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="cat")).save(str(tmp_path / "t.json"))
    ours = text.FileTokenizer(tmp_path / "t.json")
    assert (ours.vocab_size, ours.eos) == (70001, None)
    tokens = text.tokenize([write(tmp_path / "a.txt", "dog")], ours)
    assert tokens.dtype == np.int32 and tokens.tolist() == [70000]


def test_load_tokenizer_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer file 'bytes': give \"byte\" or a path"):
        text.load_tokenizer("bytes")
    broken = write(tmp_path / "broken.json", '{"version": "1.0"')
    with pytest.raises(ValueError, match=r"broken\.json is not a Hugging Face tokenizer\.json"):
        text.load_tokenizer(str(broken))
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none\.json has an empty vocabulary"):
        text.load_tokenizer(str(tmp_path / "none.json"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"broken\.json needs the package tokenizers: pip install"):
        text.load_tokenizer(str(broken))


def test_tokenize_puts_eos_after_each_document_and_skips_empty_ones(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "b.txt", "hi"),
        write(tmp_path / "empty.txt", ""),
        write(tmp_path / "a.jsonl", '{"text": "x"}\n{"text": ""}\n{"text": "yz"}\n'),
    ]
    tokens = text.tokenize(files, text.ByteTokenizer())
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [*b"hi", 256, *b"x", 256, *b"yz", 256]


def test_tokenize_in_many_batches_equals_one_document_at_a_time(tmp_path: Path, peer: tokenizers.Tokenizer) -> None:
    # 5 files of 2 million characters fill the 4-million batch twice and leave a rest.
    files = [write(tmp_path / f"{n}.txt", f"{n} " + " " * 2_000_000) for n in range(5)]
    assert [len(batch) for batch in text._batches(files)] == [2, 2, 1]
    tokens = text.tokenize(files, text.ByteTokenizer(), progress=True)
    assert len(tokens) == 5 * 2_000_003
    assert tokens[::2_000_003].tolist() == [ord(str(n)) for n in range(5)]
    lines = write(tmp_path / "c.jsonl", "".join(json.dumps({"text": line}) + "\n" for line in CORPUS))
    expected = [token for line in CORPUS for token in [*peer.encode(line, add_special_tokens=False).ids, 1]]
    assert text.tokenize([lines], text.FileTokenizer(tmp_path / "tokenizer.json")).tolist() == expected


def test_tokenize_refuses_no_text(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n}.txt", "") for n in range(5)]
    with pytest.raises(ValueError, match=r"no text in .*0\.txt, .*2\.txt and 2 more files"):
        text.tokenize(files, text.ByteTokenizer())
    with pytest.raises(ValueError, match="no text in an empty list"):
        text.tokenize([], text.ByteTokenizer())


def test_split_files_holds_out_every_kth() -> None:
    files = [Path(f"{n:02}.txt") for n in range(45)]
    train, held_out = text.split_files(files)
    assert held_out == [files[19], files[39]]
    assert sorted(train + held_out) == files and len(train) == 43
    assert text.split_files(files[:3]) == (files[:2], files[2:3])
    assert text.split_files(files[:1]) == (files[:1], [])
    with pytest.raises(ValueError, match="every = 1 leaves no file to train on"):
        text.split_files(files, every=1)


def test_unigram_entropy_of_known_distributions() -> None:
    assert text.unigram_entropy(np.arange(257, dtype=np.uint16).repeat(3)) == pytest.approx(math.log(257))
    skewed = np.array([5] * 1 + [70000] * 3, dtype=np.int32)
    assert text.unigram_entropy(skewed) == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    assert text.unigram_entropy(np.zeros(9, dtype=np.uint16)) == 0
    # A chunk later than the first brings a smaller largest id, then a larger one.
    long = np.concatenate([np.full(2**20, 3), np.full(2**19, 1), np.full(2**20, 9)]).astype(np.uint16)
    assert text.unigram_entropy(long) == pytest.approx(0.8 * math.log(2.5) + 0.2 * math.log(5))
    with pytest.raises(ValueError, match="0 tokens"):
        text.unigram_entropy(np.array([], dtype=np.uint16))
