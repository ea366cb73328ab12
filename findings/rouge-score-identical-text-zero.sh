#!/usr/bin/env bash
# rouge_score 0.1.2: a summary identical to its reference scores 0 in most of the world's scripts.
#
# The default tokenizer keeps a-z and 0-9 only. Text in Cyrillic, Devanagari or Chinese has no tokens left, and a text
# without tokens scores 0, also against itself; mixed text is compared by its numbers alone and scores 1 where only they
# agree. Neither warns. `RougeScorer(tokenizer=...)` takes another tokenizer.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
[ -x "$venv/bin/python" ] || "${FINDINGS_PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet rouge_score==0.1.2

cat >"$work/probe.py" <<'PROBE'
from importlib.metadata import version

from rouge_score import rouge_scorer

scorer = rouge_scorer.RougeScorer(["rougeL"])
cases = [
    ("the cat sat on the mat", "the cat sat on the mat", 1.0),
    ("кошка сидит на ковре", "кошка сидит на ковре", 0.0),
    ("बिल्ली चटाई पर बैठी है", "बिल्ली चटाई पर बैठी है", 0.0),
    ("猫坐在垫子上", "猫坐在垫子上", 0.0),
    ("школа 12", "автобус 12", 1.0),
]
print("rouge_score", version("rouge_score"))
for reference, summary, expected in cases:
    score = scorer.score(reference, summary)["rougeL"].fmeasure
    print(f"ROUGE-L {score:.1f}: {reference!r} / {summary!r}")
    assert score == expected, f"was {expected}"
print("seen: identical text scores 0, different text with the same number scores 1")
PROBE
"$venv/bin/python" "$work/probe.py"
