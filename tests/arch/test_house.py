"""The measures of the house: sizes that fit a screen or a glance, one owner for one thing, imports without circles.

Lines are counted without docstrings.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

import dsprune

PACKAGE = Path(dsprune.__file__).parent
TESTS = Path(__file__).parents[1]
SOURCES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
MOST_FILES = 15
LONGEST_FUNCTION, NINE_OF_TEN = 45, 17
LARGEST_CLASS = 250
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)

UNSORTED = (PACKAGE / "methods",)
"""Folders that are yet to get rooms."""

NAMESAKES = {
    "base": "what the others of the folder derive from",
    "config": "dsprune's own, and DeepSpeed's",
    "budget": "of any cost, and of milliseconds",
    "cost": "by count, and by clock",
    "check": "of DeepSpeed's configuration, and of a latency table",
    "evidence": "what a method wants to see, and who shows it",
    "models": "of a run, and those that are timed",
    "cofi": "the method, and its authors' models",
    "grain": "the method, and its authors' models",
    "mlpruning": "the method, and its authors' models",
    "losses": "of tasks, and of students beside their teachers",
    "side_files": "beside a model's weights: those that are written, and those that are copied",
}
"""Names of two files; their folders say which is which."""


def _named(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _docstring_lines(node: ast.AST) -> int:
    docstring = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
    return docstring.end_lineno - docstring.lineno + 1 if docstring else 0


def _code_lines(node: ast.AST) -> int:
    """Lines of a function or class, and of what stands in it."""
    said = sum(_docstring_lines(inner) for inner in ast.walk(node) if isinstance(inner, (*FUNCTION, ast.ClassDef)))
    return node.end_lineno - node.lineno + 1 - said


def _lengths(*kinds: type) -> Iterator[tuple[int, str]]:
    """Lines of every function or class, and its name."""
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, kinds):
                yield _code_lines(node), f"{_named(path)}: {node.name}"


def _imported(tree: ast.AST) -> Iterator[str]:
    """Modules that a file imports, at its top or in a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def _files_that_import(package: str) -> set[str]:
    return {
        _named(path)
        for path, tree in SOURCES.items()
        if any(name == package or name.startswith(f"{package}.") for name in _imported(tree))
    }


def _files_with(dotted: str) -> set[str]:
    """Files where the names stand behind one another: `AutoConfig.from_pretrained`."""
    return {
        _named(path)
        for path, tree in SOURCES.items()
        if any(ast.unparse(node).endswith(dotted) for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    }


def test_a_folder_is_read_at_a_glance():
    counts = Counter(path.parent for root in (PACKAGE, TESTS) for path in root.rglob("*.py"))
    assert {
        folder.name: count for folder, count in counts.items() if count > MOST_FILES and folder not in UNSORTED
    } == {}


def test_a_function_fits_a_screen():
    lengths = sorted(_lengths(*FUNCTION))
    assert [(lines, name) for lines, name in lengths if lines > LONGEST_FUNCTION] == []
    assert lengths[int(0.9 * len(lengths))][0] <= NINE_OF_TEN


def test_a_class_is_no_program():
    assert [(lines, name) for lines, name in _lengths(ast.ClassDef) if lines > LARGEST_CLASS] == []


def test_imports_have_no_circles():
    """Those in functions count as well; what only types need is not there when a program runs."""
    graph = grimp.build_graph("dsprune", exclude_type_checking_imports=True)
    needs = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    order = list(TopologicalSorter(needs).static_order())  # raises and names the circle
    assert len(order) == len(needs) > 200


def test_one_room_imports_deepspeed():
    assert {name.rpartition("/")[0] for name in _files_that_import("deepspeed")} == {"engine/zero"}


def test_few_know_what_a_target_counts():
    """All others ask the budget."""
    knows = {
        _named(path)
        for path, tree in SOURCES.items()
        for node in ast.walk(tree)
        if "target_of" in (getattr(node, "attr", None), getattr(node, "arg", None), getattr(node, "value", None))
        or (isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "target_of")
    }
    assert "config.py" in knows
    assert len(knows) <= 3, knows


@pytest.mark.parametrize(
    ("what", "owner"), [("AutoConfig.from_pretrained", "pretrained.py"), ("difflib.get_close_matches", "files.py")]
)
def test_one_file_does_it_for_all(what, owner):
    assert _files_with(what) == {owner}


def test_the_first_line_of_an_error_is_asked_for():
    """`splitlines()[0]` fails on an error that says nothing."""
    first = {
        _named(path)
        for path, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Call)
        and getattr(node.value.func, "attr", None) == "splitlines"
    }
    assert first == set()


def test_number_formats_stand_in_one_table():
    names = {"float32", "bfloat16", "float16"}
    tables = {
        _named(path)
        for path, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.Dict, ast.List, ast.Tuple, ast.Set))
        and names <= {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
    }
    assert tables == {"dtypes.py"}


def test_files_of_one_name_mean_one_thing():
    places = defaultdict(list)
    for path in SOURCES:
        if path.name != "__init__.py" and path.parent.name != "stages":  # these bear their stages' names
            places[path.stem].append(_named(path))
    assert {name: found for name, found in places.items() if len(found) > 1 and name not in NAMESAKES} == {}


def test_lines_are_counted_without_docstrings():
    tree = ast.parse(
        'class A:\n    """One."""\n\n    def f(self):\n        """Two\n        lines."""\n        return 1\n'
    )
    made, function = (node for node in ast.walk(tree) if isinstance(node, (*FUNCTION, ast.ClassDef)))
    assert (_code_lines(made), _code_lines(function)) == (4, 2)
