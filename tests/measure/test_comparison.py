"""Runs side by side: the table, the front, the picture."""

import json

from dsprune.measure.comparison import compare_runs, pareto_front, read_point


def _run(folder, name, *, sparsity, score, method="cofi", task="sst2"):
    run = folder / name
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"method": {"name": method}}))
    report = {
        "task": task,
        "dense": {"metrics": {"accuracy": 0.93}, "latency_ms": 10.0},
        "compact": {
            "metrics": {"accuracy": score},
            "sparsity": {"encoder": sparsity},
            "parameters": {"total": 1000},
            "latency_ms": 4.0,
        },
    }
    (run / "report.json").write_text(json.dumps(report))
    return run


def test_table_front_and_picture(tmp_path):
    runs = [
        _run(tmp_path, "a", sparsity=0.6, score=0.92),
        _run(tmp_path, "b", sparsity=0.6, score=0.91, method="grain"),
        _run(tmp_path, "c", sparsity=0.95, score=0.90),
        _run(tmp_path, "d", sparsity=0.8, score=0.89),
        _run(tmp_path, "e", sparsity=0.5, score=0.80, task="mrpc"),
        tmp_path / "unfinished",
    ]
    text = compare_runs(runs, plot=tmp_path / "pareto.png")
    lines = text.splitlines()
    marked = [line.split()[1] for line in lines if line.startswith("*") and "no other" not in line]
    assert marked == ["e", "a", "c"]
    assert "unfinished: unfinished" in lines
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_the_front_holds_what_nothing_beats(tmp_path):
    points = [
        read_point(_run(tmp_path, f"{i}", sparsity=s, score=q))
        for i, (s, q) in enumerate([(0.5, 0.9), (0.6, 0.9), (0.7, 0.8), (0.7, 0.85), (0.9, 0.7)])
    ]
    assert [(p.sparsity, p.score) for p in pareto_front(points)] == [(0.6, 0.9), (0.7, 0.85), (0.9, 0.7)]


def test_less_perplexity_is_in_front(tmp_path):
    points = []
    for i, (sparsity, perplexity) in enumerate([(0.5, 30.0), (0.6, 25.0), (0.7, 40.0)]):
        run = _run(tmp_path, f"{i}", sparsity=sparsity, score=perplexity)
        report = json.loads((run / "report.json").read_text())
        (run / "report.json").write_text(json.dumps(report | {"lower_is_better": True}))
        points.append(read_point(run))
    assert [(p.sparsity, p.score) for p in pareto_front(points)] == [(0.6, 25.0), (0.7, 40.0)]


def test_nothing_finished(tmp_path):
    assert compare_runs([tmp_path / "x"], plot=tmp_path / "p.png") == "unfinished: x"
    assert not (tmp_path / "p.png").exists()
