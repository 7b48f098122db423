"""Training data: text or files of token ids in, batches of windows out."""

from tpformer.data.indexed import (
    IndexedTokens,
    check_vocabulary,
    open_tokens,
    read_indexed,
    read_nanogpt,
    write_indexed,
)
from tpformer.data.sampler import TokenSampler
from tpformer.data.text import (
    ByteTokenizer,
    FileTokenizer,
    Tokenizer,
    documents,
    find_files,
    find_tokenizer,
    load_tokenizer,
    python_library_files,
    split_files,
    tokenize,
    unigram_entropy,
)

__all__ = [
    "ByteTokenizer",
    "FileTokenizer",
    "IndexedTokens",
    "TokenSampler",
    "Tokenizer",
    "check_vocabulary",
    "documents",
    "find_files",
    "find_tokenizer",
    "load_tokenizer",
    "open_tokens",
    "python_library_files",
    "read_indexed",
    "read_nanogpt",
    "split_files",
    "tokenize",
    "unigram_entropy",
    "write_indexed",
]
