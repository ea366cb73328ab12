"""ROUGE-L (Lin 2004) of texts in any script, by the reference package with a tokenizer of our own.

That of the package keeps nothing but a to z and 0 to 9: a Russian, Chinese or Hindi text has no tokens there and scores
0 whatever it says, and `café` is the same as `caf`. Here a token is a run of letters (with the marks that belong to
them) and digits of any script, in lower case; what else there is separates tokens. Both find the same tokens in text
whose letters and digits are a to z and 0 to 9, as English has them. In scripts that are written without spaces between
words (Chinese, Japanese, Thai, Lao, Khmer, Burmese), every character is a token, as is usual for them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import regex

__all__ = ["UnicodeTokenizer", "reads_more", "rouge_l"]

_UNSPACED = r"[[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]&&[\p{L}\p{Nl}]]"
_SPACED = rf"[[\p{{L}}\p{{Nl}}\p{{Nd}}]--{_UNSPACED}]"
_MARKS = r"[\p{Mn}\p{Mc}]"
_TOKEN = regex.compile(rf"{_UNSPACED}{_MARKS}*|{_SPACED}[{_SPACED}{_MARKS}]*", regex.VERSION1)
_INVISIBLE = regex.compile(r"[\u200C\u200D\p{Variation_Selector}]")
"""Joiners, inside words of Hindi or Persian, and the like: they change how letters look, not which they are."""
_REFERENCE = re.compile(r"[a-z0-9]+")


class UnicodeTokenizer:
    """What `rouge_score` asks of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        """Tokens of a text; the same for composed and decomposed letters."""
        tokens: list[str] = _TOKEN.findall(unicodedata.normalize("NFC", _INVISIBLE.sub("", text.lower())))
        return tokens


def rouge_l(written: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 of the longest common subsequence of tokens, unstemmed: a fraction of 1.

    Args:
        written: texts to score.
        references: as many right ones.
    """
    from rouge_score import rouge_scorer  # brings nltk along, which takes a second

    scorer: Any = rouge_scorer.RougeScorer(["rougeL"], tokenizer=UnicodeTokenizer())
    pairs = zip(written, references, strict=True)
    return float(sum(scorer.score(right, text)["rougeL"].fmeasure for text, right in pairs) / len(references))


def reads_more(text: str) -> bool:
    """Whether a text has other tokens than the package's own tokenizer finds in it."""
    return UnicodeTokenizer().tokenize(text) != _REFERENCE.findall(text.lower())
