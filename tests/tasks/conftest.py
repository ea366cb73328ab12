"""A tokenizer of whole words that needs no files, and tiny data folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel, WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer, Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
WORDS = {word: len(SPECIAL) + i for i, word in enumerate("the cat sat on a mat and dog ran".split())}

Write = Callable[[Path, dict[str, list[Any]]], Path]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel(SPECIAL | WORDS, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    return _with_specials(backend)


@pytest.fixture(scope="session")
def speller() -> PreTrainedTokenizerFast:
    """Spells lower-case words piece by piece: one piece a letter or mark."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,-"
    pieces = [*letters, *(f"##{letter}" for letter in letters)]
    vocab = SPECIAL | {piece: len(SPECIAL) + i for i, piece in enumerate(pieces)}
    backend = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = BertPreTokenizer()
    return _with_specials(backend)


def _with_specials(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", SPECIAL["[CLS]"]), ("[SEP]", SPECIAL["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture
def write() -> Write:
    """Write columns to a parquet, jsonl or csv file, its folder made."""

    def write(path: Path, columns: dict[str, list[Any]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if path.suffix == ".parquet":
            pq.write_table(pa.table(columns), path)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        else:
            separator = {".csv": ",", ".tsv": "\t"}[path.suffix]
            lines = [list(columns), *(row.values() for row in rows)]
            path.write_text("".join(separator.join(map(str, line)) + "\n" for line in lines), encoding="utf-8")
        return path

    return write
