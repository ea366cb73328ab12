"""Writes the pages that are made from code: recipes.md from the recipes, families.md from the families.

python docs/generate.py            # write them
python docs/generate.py --check    # say which are out of date, and fail (tests do the same)
"""

from __future__ import annotations

import sys
import tomllib
from importlib import resources
from pathlib import Path

DOCS = Path(__file__).parent
HEAD = "<!-- Made by docs/generate.py: change the code, not this page. -->\n\n"
ABOUT_RECIPES = """\
`dsprune train NAME` runs one; any key can be overridden (`prune.target=0.6 output=runs/x`). Their files, with the
reasons for their values, are in `dsprune/recipes/`."""
ABOUT_FAMILIES = """\
What `dsprune families` prints: each cell is run by a test, each gap has the reason that refuses a run."""
BELOW_FAMILIES = """\
`deberta-v2` is DeBERTa-v2 and v3, whose scores stay those of the dense head whatever size its heads come out. Under
grouped-query attention a head is a key/value head with all queries that share it; under rotary positions a query
dimension is a pair. Decoders generate with a cache, token for token what the masked model would. A family is one TOML
file: [how to add one](../CONTRIBUTING.md)."""


def _first_words(text: str) -> str:
    """The first sentence of a recipe's opening comment."""
    comment = []
    for line in text.splitlines():
        if not line.startswith("#") or line.strip() == "#":
            break
        comment.append(line.lstrip("# ").strip())
    return " ".join(comment).rstrip(":")


def recipes_page() -> str:
    """One row a recipe."""
    from dsprune.config import list_recipes

    rows = ["| recipe | task | method | model | target | what it is |", "| --- | --- | --- | --- | --- | --- |"]
    for name in list_recipes():
        text = (resources.files("dsprune") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
        recipe = tomllib.loads(text)
        cells = [
            f"`{name}`",
            recipe["task"]["name"],
            recipe["method"]["name"],
            recipe["model"]["name"],
            f"{recipe.get('prune', {}).get('target', 'default')}",
            _first_words(text),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return f"# Recipes\n\n{HEAD}{ABOUT_RECIPES}\n\n" + "\n".join(rows) + "\n"


def families_page() -> str:
    """The table of what prunes what, with the reasons for its gaps."""
    from dsprune.methods.support import families_table

    return f"# Families\n\n{HEAD}{ABOUT_FAMILIES}\n\n{families_table()}\n\n{BELOW_FAMILIES}\n"


PAGES = {"recipes.md": recipes_page, "families.md": families_page}


def main() -> int:
    """Write or check all pages."""
    stale = []
    for name, make in PAGES.items():
        path, text = DOCS / name, make()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"{'out of date' if '--check' in sys.argv else 'written'}: {', '.join(stale)}")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
