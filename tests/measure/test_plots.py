import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsprune.errors import OutputError
from dsprune.measure.plots import plot_run

DENSE = {"heads": 12, "ffn_dim": 3072}
LAYERS = [{"heads": 4, "ffn_dim": 310}, {"heads": 0, "ffn_dim": 0}, {"heads": 12, "ffn_dim": 3072}]
TEACHER = [{"stage": "teacher", "step": 10, "loss/total": 0.7}, {"stage": "teacher", "step": 20, "eval/accuracy": 0.9}]
PRUNE = [
    {"stage": "prune", "step": 0, "sparsity/target": 0.0, "sparsity/expected": 0.01, "sparsity/hard": 0.0},
    {"stage": "prune", "step": 40, "sparsity/target": 0.6, "sparsity/expected": 0.58, "sparsity/hard": 0.55},
    {"stage": "prune", "step": 40, "eval/accuracy": 0.85},
]
RECOVER = [{"stage": "recover", "step": 30, "eval/accuracy": 0.88}]


def _draw(metrics: Sequence[Mapping[str, Any]], path: Path = Path("unused.png"), *, repeat: int = 1) -> None:
    plot_run(metrics, LAYERS * repeat, DENSE, path, metric="accuracy", title="a model on a task: 60% of the encoder")


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of the figure that is drawn in the test: heads, FFN, curves, and the metric's if there is one."""
    drawn: list[Axes] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.extend(self.axes))
    return drawn


@pytest.mark.parametrize(
    "metrics",
    [[*TEACHER, *PRUNE, *RECOVER], PRUNE[:2], TEACHER[:1], [{"stage": "prune", "step": 0}], []],
    ids=["all", "no metric", "losses only", "no step", "nothing"],
)
@pytest.mark.filterwarnings("error")
def test_a_png_of_1800_by_1200(metrics: Sequence[Mapping[str, Any]], tmp_path: Path) -> None:
    _draw(metrics, tmp_path / "run.png")
    data = (tmp_path / "run.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1800, 1200)
    assert len(data) > 20_000


def test_bars_stand_for_what_is_kept(panels: list[Axes]) -> None:
    _draw(PRUNE)
    for axes, kind in zip(panels, ("heads", "ffn_dim"), strict=False):
        dense, kept = axes.containers
        assert [bar.get_height() for bar in dense] == [DENSE[kind]] * 3
        assert [bar.get_height() for bar in kept] == [layer[kind] for layer in LAYERS]
        assert [text.get_text() for text in axes.texts] == [str(layer[kind]) for layer in LAYERS]


def test_stages_lie_one_after_another(panels: list[Axes]) -> None:
    _draw([*RECOVER, *PRUNE, *TEACHER])
    _, _, curves, metric = panels
    assert [text.get_text() for text in curves.texts] == ["teacher", "prune", "recover"]
    curve = {line.get_label(): line.get_xydata().tolist() for line in curves.lines}
    assert curve["expected sparsity"] == [[20, 0.01], [60, 0.58]]
    assert curve["target sparsity"] == [[20, 0.0], [60, 0.6]]
    assert [line.get_xydata().tolist() for line in metric.lines] == [[[20, 0.9]], [[60, 0.85]], [[90, 0.88]]]
    legend = curves.get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["target sparsity", "expected sparsity", "hard sparsity", "accuracy (right)"]


def test_the_metric_of_every_split_is_drawn_and_no_other(panels: list[Axes]) -> None:
    scores = {"eval/matched/accuracy": 0.8, "eval/mismatched/accuracy": 0.7, "eval/matched/best_f1_thresh": -12.5}
    _draw([{"stage": "prune", "step": 10} | scores])
    labels = [line.get_label() for line in panels[3].lines]
    assert labels == ["matched/accuracy (right)", "mismatched/accuracy (right)"]


def test_a_missing_stage_takes_no_room(panels: list[Axes]) -> None:
    _draw(PRUNE)
    assert [text.get_text() for text in panels[2].texts] == ["prune"]
    assert panels[2].lines[0].get_xdata().tolist() == [0, 40]


def test_nothing_logged_is_said(panels: list[Axes]) -> None:
    _draw([])
    assert len(panels) == 3
    assert "no sparsity and no metric was logged" in [text.get_text() for text in panels[2].texts]


def test_the_legend_covers_no_data(panels: list[Axes]) -> None:
    _draw([*TEACHER, *PRUNE, *RECOVER])
    panels[0].figure.draw_without_rendering()
    for axes in panels[:3]:
        legend = axes.get_legend()
        assert legend is not None
        assert legend.get_window_extent().y0 >= axes.get_window_extent().y1


def test_many_layers(panels: list[Axes]) -> None:
    _draw(PRUNE, repeat=16)
    assert len(panels[0].patches) == 96
    assert not panels[0].texts, "no room for counts"


def test_the_backend_is_left_alone(panels: list[Axes]) -> None:
    before = mpl.rcParams._get("backend")
    _draw(PRUNE)
    assert mpl.rcParams._get("backend") == before


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write the picture"):
        plot_run(PRUNE, LAYERS, DENSE, tmp_path / "missing" / "run.png", metric="accuracy", title="")
