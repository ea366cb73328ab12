"""The command line: what users type, and what a rank runs."""

from dsprune.cli.entry import guarded, main, train_main

__all__ = ["guarded", "main", "train_main"]
