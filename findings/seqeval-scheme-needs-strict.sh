#!/usr/bin/env bash
# seqeval 1.2.2: `scheme=` and `mode="strict"` do nothing each for itself, in silence; only both together are strict.
#
# A tagger may answer I-PER where an entity begins (the official CoNLL scoring counts that as a beginning, IOB2 does
# not). `f1_score(..., scheme=IOB2)` reads as "score as IOB2" and `mode="strict"` as "be strict"; each returns the
# lenient score, without a warning.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
[ -x "$venv/bin/python" ] || "${FINDINGS_PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet seqeval==1.2.2 scikit-learn==1.9.1 numpy==2.4.6

cat >"$work/probe.py" <<'PROBE'
from importlib.metadata import version

from seqeval.metrics import f1_score
from seqeval.scheme import IOB2

gold = [["B-PER", "I-PER", "O", "B-LOC"]]
answer = [["I-PER", "I-PER", "O", "B-LOC"]]
seen = {
    "neither": f1_score(gold, answer),
    'mode="strict"': f1_score(gold, answer, mode="strict"),
    "scheme=IOB2": f1_score(gold, answer, scheme=IOB2),
    "both": f1_score(gold, answer, mode="strict", scheme=IOB2),
}
print("seqeval", version("seqeval"))
for arguments, score in seen.items():
    print(f"entity F1, {arguments}: {score:.4f}")
assert list(seen.values())[:3] == [1.0, 1.0, 1.0], "one argument alone now has an effect"
assert abs(seen["both"] - 2 / 3) < 1e-9, "strict IOB2 scoring has changed"
print("seen: either argument alone is ignored")
PROBE
"$venv/bin/python" "$work/probe.py"
