"""`python -m dsprune`: the same as the `dsprune` command."""

import sys

from dsprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
