"""Entry point of a training rank: `deepspeed dsprune/train.py RECIPE [key=value ...]`."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Run by path, Python puts this folder first on sys.path, where our modules would shadow others'.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dsprune.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main(sys.argv[1:]))
