"""What is held out is not trained on, and the vocabulary is the tokenizer's or one that holds it."""

from pathlib import Path

import numpy as np
import pytest

from tests.examples.launch import token_ids
from tpformer.data import ByteTokenizer, write_indexed
from tpformer.train.config import DataConfig
from tpformer.train.corpus import load_corpus


def test_whole_files_are_held_out_and_no_token_is_lost(tmp_path: Path) -> None:
    """Each of ten files is a hundred of one letter: no letter is on both sides."""
    for number, letter in enumerate("abcdefghij"):
        (tmp_path / f"{number}.txt").write_text(letter * 100)
    for part, held_out in ((0.1, 1), (0.2, 2), (0.5, 5)):
        corpus = load_corpus(DataConfig(str(tmp_path), validation_part=part, seq_len=8), 0, progress=False)
        sides = [set(np.unique(tokens)) - {256} for tokens in (corpus.train, corpus.validation)]
        assert [len(side) for side in sides] == [10 - held_out, held_out]
        assert len(sides[0] | sides[1]) == 10
        assert len(corpus.train) + len(corpus.validation) == 1010
        assert corpus.vocab_size == 257
        assert isinstance(corpus.tokenizer, ByteTokenizer)


def test_of_one_file_the_end_is_held_out(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(999))
    (tmp_path / "one.txt").write_text(text)
    config = DataConfig(str(tmp_path / "one.txt"), validation_part=0.1, seq_len=8)
    corpus = load_corpus(config, 0, progress=False)
    assert len(corpus.validation) == 100
    assert ByteTokenizer().decode([*corpus.train.tolist(), *corpus.validation.tolist()]) == text
    # but never less than one sample
    corpus = load_corpus(DataConfig(config.data, validation_part=0.001, seq_len=50), 0, progress=False)
    assert len(corpus.validation) == 51


def test_of_token_ids_the_end_is_held_out_too(tmp_path: Path) -> None:
    ids = token_ids(1000, 90)
    write_indexed(tmp_path / "pair", [ids], 90)
    corpus = load_corpus(DataConfig(str(tmp_path / "pair"), validation_part=0.2, seq_len=8), 90, progress=False)
    assert corpus.train.tolist() == ids[:800].tolist()
    assert corpus.validation.tolist() == ids[800:].tolist()
    assert (corpus.vocab_size, corpus.tokenizer) == (90, None)


def test_a_larger_vocabulary_may_be_asked_for(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("some text " * 30)
    config = DataConfig(str(tmp_path / "one.txt"), seq_len=8)
    assert load_corpus(config, 512, progress=False).vocab_size == 512
    with pytest.raises(ValueError, match="must be at least 257"):
        load_corpus(config, 256, progress=False)


def test_the_library_of_this_python_is_text_enough() -> None:
    """What `make pretrain` trains on: some megabytes, about a twentieth of them held out."""
    corpus = load_corpus(DataConfig(), 0, progress=False)
    assert len(corpus.train) > 5e6
    assert 0.02 < len(corpus.validation) / len(corpus.train) < 0.1
    assert max(corpus.train.max(), corpus.validation.max()) <= 256
