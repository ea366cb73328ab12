"""What the parsers of all commands have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

__all__ = ["Commands", "add_command"]

Commands = Any
"""What `add_subparsers` gives; argparse keeps its type to itself."""


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """A command whose help shows how it is typed.

    Args:
        commands: where it is added.
        name: of the command.
        run: does it, and returns the exit code.
        summary: its line in `dsprune --help`.
        description: above its arguments.
        examples: below them, a command a line.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser
