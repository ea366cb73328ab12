from __future__ import annotations

from typing import Any

import pytest

from dsprune.errors import DataError
from dsprune.tasks.sources.label_names import as_list, as_number, find_names, label_reader, listed, name_of

TWO = ("negative", "positive")
MNLI = ("entailment", "neutral", "contradiction")
STARS = ("1", "2", "3", "4", "5")


@pytest.mark.parametrize("names", [TWO, ("not_entailment", "entailment")])
def test_two_labels(names: tuple[str, ...]) -> None:
    read = label_reader(names)
    for place, spellings in enumerate(
        [
            [0, 0.0, "0", "0.0", False, "false", "False", "LABEL_0", names[0], names[0].upper()],
            [1, 1.0, "1", "1.0", True, "true", "TRUE", "LABEL_1", f" {names[1].title()} "],
        ]
    ):
        for value in spellings:
            assert read(value) == place, value


@pytest.mark.parametrize(
    "value",
    [2, -1, 0.5, "2", "-1", "0.5", 1.5, "", " ", None, float("nan"), float("inf"), "neutral", "pos", [1], {}, b"1"],
)
def test_what_is_no_label(value: Any) -> None:
    assert label_reader(TWO)(value) is None


def test_names_may_be_written_otherwise() -> None:
    read = label_reader(("not_entailment", "entailment"))
    assert [read(name) for name in ("Not Entailment", "not-entailment", "NOTENTAILMENT")] == [0, 0, 0]


def test_more_than_two_labels_are_no_booleans() -> None:
    read = label_reader(MNLI)
    assert [read(value) for value in (2, 2.0, "contradiction", "LABEL_2", True, "true")] == [2, 2, 2, 2, None, None]


def test_numbers_that_are_names_are_no_places() -> None:
    read = label_reader(STARS)
    assert [read(value) for value in (1, 1.0, "1", "1.0", 5)] == [0, 0, 0, 0, 4]
    assert [read(value) for value in (0, "0", 6, True, "LABEL_1")] == [None] * 5
    signs = label_reader(("-1", "0", "1"))
    assert [signs(value) for value in (-1, 0, 1, "-1", "1.0")] == [0, 1, 2, 0, 2]


def test_booleans_of_labels_that_are_named_0_and_1() -> None:
    assert [label_reader(("0", "1"))(value) for value in (False, True, "true", 1)] == [0, 1, 1, 1]
    assert [label_reader(("1", "0"))(value) for value in (False, True, "0", 1)] == [1, 0, 1, 0]


def test_what_tells_two_labels_apart_counts() -> None:
    read = label_reader(("C", "c", "c-"))
    assert [read(value) for value in ("C", "c", "c-", "c_", 1)] == [0, 1, 2, None, 1]


def test_names_that_are_found() -> None:
    assert find_names(["spam", "ham", "spam", " ham "]) == ("ham", "spam")
    assert find_names([10, 9, 2.0, "1"]) == ("1", "2", "9", "10")
    assert find_names(["1.0", "0.0"]) == ("0", "1")
    assert find_names([True, False]) == ("False", "True")
    assert find_names([1, -1, 0]) == ("-1", "0", "1")
    assert find_names(["007", "7"]) == ("007", "7")
    assert name_of("") is name_of(None) is name_of([1]) is name_of(float("nan")) is None


def test_names_do_not_depend_on_the_order_of_the_examples() -> None:
    values = [f"label {i}" for i in range(50)] + [3, 2.5]
    assert find_names(values) == find_names(values[::-1])


def test_every_name_that_is_found_is_read() -> None:
    values = ["spam", "ham", 3, 4.0, True, "no way"]
    names = find_names(values)
    assert {names[label_reader(names)(value)] for value in values} == set(names)


def test_names_that_only_spelling_tells_apart() -> None:
    with pytest.raises(
        DataError, match="labels 'Spam' and 'spam' differ in case, spaces, hyphens or underscores alone"
    ):
        find_names(["spam", "Spam", "ham"])


@pytest.mark.parametrize(
    ("cell", "separator", "values"),
    [
        (["a", 1], ",", ["a", 1]),
        ("a, b,c", ",", ["a", "b", "c"]),
        ("a|b", "|", ["a", "b"]),
        ("a", ",", ["a"]),
        ("", ",", []),
        (" , ", ",", []),
        ("['a', 'b']", ",", ["a", "b"]),
        ('["a", "b"]', ",", ["a", "b"]),
        ("[1, 2]", ",", [1, 2]),
        ("[]", ",", []),
        ("[laughs], sighs, [coughs]", ",", ["[laughs]", "sighs", "[coughs]"]),
        (" the  cat\tsat ", None, ["the", "cat", "sat"]),
        (None, ",", None),
        (7, ",", 7),
    ],
)
def test_cells_that_hold_several_values(cell: Any, separator: str | None, values: Any) -> None:
    assert as_list(cell, separator) == values


def test_numbers() -> None:
    assert [as_number(value) for value in (1, 2.5, "2.5", " -3 ", "1e-3", ".5")] == [1.0, 2.5, 2.5, -3.0, 1e-3, 0.5]
    assert [as_number(v) for v in (True, "nan", "inf", "", "3,5", None, float("nan"), "1_0", [1])] == [None] * 9


def test_lists_in_messages_are_short() -> None:
    assert listed(range(3)) == "0, 1, 2"
    assert listed(range(100)) == f"{', '.join(map(str, range(12)))} and 88 more"
