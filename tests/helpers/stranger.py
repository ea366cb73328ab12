"""Code that runs as a stranger's would: torch and transformers are there, dsprune is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HIDE = """
import os, sys
# An editable install must not be seen either.
sys.path[:] = [p for p in sys.path if not os.path.exists(os.path.join(p, "dsprune", "__init__.py"))]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
try:
    import dsprune
except ImportError:
    pass
else:
    raise SystemExit("dsprune must not be importable here")
"""


def run_stranger(code: str, folder: Path, *arguments: object) -> str:
    """What a program prints that cannot import dsprune.

    Args:
        code: reads `arguments` from `sys.argv[1:]`.
        folder: where it runs, and keeps the modules that transformers copies.
    """
    env = {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        # -P keeps the current folder off the path.
        [sys.executable, "-P", "-c", f"{HIDE}\n{code}", *map(str, arguments)],
        cwd=folder,
        env={**env, "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
