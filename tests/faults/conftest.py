"""Ground and reference runs that all faults share: one undisturbed run for each way of running."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.runs import execute, ground, words
from tests.helpers.world import run_world


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was killed has no last words to wait for, and these tests kill a lot."""
    monkeypatch.setattr("dsprune.run.status.PATIENCE_SECONDS", 1.0)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture(scope="session")
def undisturbed(place: Path) -> Callable[..., Path]:
    """Folder of a run to which nothing happened; run once for each way of running."""

    @cache
    def run(method: str = "cofi", student: str = "zero2", world_size: int = 2) -> Path:
        folder = place / f"whole-{method}-{student}-{world_size}"
        codes = run_world(execute, world_size, *words(place, folder, method=method, student=student))
        assert codes == [0] * world_size
        return folder

    return run
