"""The matrix itself: every fault has a test that bears its number."""

import re
from pathlib import Path

FAULTS = 32


def test_every_fault_of_the_matrix_is_tested():
    text = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    tested = {
        int(number) for name in re.findall(r"def test((?:_f\d\d)+)", text) for number in re.findall(r"\d\d", name)
    }
    assert tested == set(range(1, FAULTS + 1)), sorted(set(range(1, FAULTS + 1)) - tested)
