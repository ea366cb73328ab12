"""Docs that stay true: links that lead somewhere, commands that parse, recipes that exist, pages that are current."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from dsprune.config import list_recipes, load_config
from dsprune.methods import method_options

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "findings").glob("*.md"),
    *(ROOT / "examples").glob("*.md"),
]
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
INDENTED = re.compile(
    r"^    (?:\$ )?((?:dsprune|deepspeed dsprune/train\.py|make|python -m tests\.\S+) ?.*)$", re.MULTILINE
)


def _commands():
    """Every command that stands indented in a page, joined over its continuation lines, without its comment."""
    for page in PAGES:
        text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
        for match in INDENTED.finditer(text):
            yield page, match[1].split("  #")[0].split(" # ")[0].strip()


COMMANDS = sorted({(page.relative_to(ROOT).as_posix(), command) for page, command in _commands()})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    links = [target for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    missing = [target for target in links if not (page.parent / target).exists()]
    assert not missing


def test_pages_made_from_code_are_current():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    stale = [name for name, make in generate.PAGES.items() if (ROOT / "docs" / name).read_text() != make()]
    assert not stale, "python docs/generate.py"


def test_the_front_door_stays_small():
    assert len((ROOT / "README.md").read_bytes()) <= 9 * 1024


def test_there_are_commands():
    assert len(COMMANDS) > 30


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_are_ones_that_exist(page, command):
    """Parsed as the command line would; recipes are loaded with their overrides, make targets and modules looked up."""
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert next(word for word in words[1:] if "=" not in word) in targets
    elif words[0] == "python":
        assert (ROOT / (words[2].replace(".", "/") + ".py")).exists()
    elif "train" in words[:2] or words[0] == "deepspeed":
        _check_training(words[2:])
    else:
        from dsprune.cli.entry import _parser

        _parser().parse_args(words[1:])


def _check_training(words):
    options = {"--ranks": 1, "--dry-run": 0, "--keys": 0}
    names = [word for word in words if word.startswith("--")]
    assert not set(names) - set(options)
    skipped = {words.index(name) + 1 for name in names if options[name]}
    plain = [word for i, word in enumerate(words) if i not in skipped and not word.startswith("--")]
    if not plain:
        assert names == ["--keys"]
        return
    recipe, *overrides = plain
    overrides = [word for word in overrides if word != "..."]
    if recipe in list_recipes():
        load_config(recipe, overrides, method_options=method_options)
    else:
        assert recipe == "RECIPE" or recipe.endswith(".toml")
