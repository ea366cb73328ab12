# ruff: noqa: RUF001

from __future__ import annotations

import unicodedata

import pytest

from dsprune.tasks.metrics.rouge_l import UnicodeTokenizer, reads_more, rouge_l


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Привет, мир!", "привет мир"),
        ("Ещё раз", "ещё раз"),
        ("Straße und Größe", "straße und größe"),
        ("मैं हिन्दी में लिखता हूँ।", "मैं हिन्दी में लिखता हूँ"),  # vowel signs belong to their letters
        ("क्\u200dष", "क्ष"),
        ("می\u200cخواهم", "میخواهم"),
        ("مرحبا، ٣٤", "مرحبا ٣٤"),
        ("안녕하세요, 세계", "안녕하세요 세계"),
        ("我喜欢iPhone手机，二〇二四年", "我 喜 欢 iphone 手 机 二 〇 二 四 年"),
        ("コーヒーを飲む。", "コ ー ヒ ー を 飲 む"),
        ("ดีครับ", "ดี ค รั บ"),
        ("café, naïve", "café naïve"),
        ("snake_case don't", "snake case don t"),
        ("❤️ \u0301 …", ""),
    ],
)
def test_tokens(text: str, tokens: str) -> None:
    expected = [unicodedata.normalize("NFC", token) for token in tokens.split()]
    assert UnicodeTokenizer().tokenize(text) == expected
    assert UnicodeTokenizer().tokenize(unicodedata.normalize("NFD", text)) == expected


@pytest.mark.parametrize("text", ["Привет, мир", "你好，世界", "नमस्ते दुनिया", "café"])
def test_perfect_output_scores_one_in_every_script(text: str) -> None:
    assert rouge_l([text], [text]) == 1.0
    assert reads_more(text)


def test_scores_by_hand_in_other_scripts() -> None:
    assert rouge_l(["caf"], ["café"]) == 0.0
    assert rouge_l(["мир"], ["привет мир"]) == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert rouge_l(["你好界"], ["你好世界"]) == pytest.approx(2 * 1 * 0.75 / 1.75)
    assert rouge_l(["में हूँ"], ["मैं हूँ"]) == pytest.approx(0.5)  # another vowel is another word
    assert rouge_l(["да", "нет"], ["да", "да"]) == 0.5


def test_what_the_reference_package_reads_alike() -> None:
    assert not reads_more("Don't panic: it's “3.14%”…")
    assert reads_more("naïve")
