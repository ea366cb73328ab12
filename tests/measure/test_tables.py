import pytest

from dsprune.measure.tables import render_table


def test_numbers_go_right_and_words_left() -> None:
    text = render_table(["model", "ms", "note"], [["dense", "12.50", "a"], ["compact", "3.10", ""]])
    assert text.splitlines() == [
        "model       ms  note",
        "-------  -----  ----",
        "dense    12.50  a",
        "compact   3.10",
    ]


def test_a_missing_number_leaves_a_column_of_numbers() -> None:
    assert render_table(["peak"], [["-"], ["7"]]).splitlines()[2:] == ["   -", "   7"]


def test_a_column_with_one_word_goes_left() -> None:
    assert render_table(["n"], [["none"], ["7"]]).splitlines()[2:] == ["none", "7"]


def test_align_is_obeyed() -> None:
    lines = render_table(["abc", "abc", "abc"], [["1", "1", "1"]], align="<^>").splitlines()
    assert lines[2] == "1     1     1"


def test_headers_alone() -> None:
    assert render_table(["a", "bc"], []) == "a  bc\n-  --"


@pytest.mark.parametrize(
    ("rows", "align"), [([["1"]], None), ([["1", "2"]], "<"), ([["1", "2"], ["1", "2", "3"]], None)]
)
def test_a_wrong_number_of_columns_is_refused(rows: list[list[str]], align: str | None) -> None:
    with pytest.raises(ValueError, match="columns"):
        render_table(["a", "b"], rows, align=align)
