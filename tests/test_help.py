"""What `--help` says is complete, and its examples are commands."""

import argparse
import re
import shlex

import pytest

from dsprune.cli import entry
from dsprune.run_folder import STAGES


def _commands():
    """Every command's parser by its name."""
    (action,) = (a for a in entry._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


def _examples():
    texts = [entry.EPILOG, *(text for p in _commands().values() for text in (p.description, p.epilog) if text)]
    lines = [line.strip() for text in texts for line in text.splitlines() if re.match(r"\s+dsprune ", line)]
    # A remark stands behind three spaces, where there is one.
    return sorted({re.split(r"\s{2,}", line)[0] for line in lines})


def test_all_stages_and_commands_are_listed():
    text = entry._parser().format_help()
    for name in (*STAGES, *_commands()):
        assert re.search(rf"^ +{name} +\w", text, re.MULTILINE), name
    assert all(name in _commands()["train"].format_help() for name in STAGES)


def test_every_command_shows_examples():
    shown = {line.split()[1] for line in _examples()}
    assert shown >= set(_commands())


@pytest.mark.parametrize("line", _examples())
def test_examples_are_understood(line, monkeypatch):
    """Each up to the point where it would begin: its arguments are right."""
    begun = []
    monkeypatch.setattr(entry, "guarded", lambda run: begun.append(run) or 0)
    monkeypatch.setattr(entry, "_hush", lambda: None)
    assert entry.main(shlex.split(line)[1:]) == 0
    assert begun
