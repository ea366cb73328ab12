from __future__ import annotations

from pathlib import Path

import pytest

from dsprune.config import Duration, RunConfig, list_recipes, load_config
from dsprune.errors import ConfigError
from dsprune.methods import method_options
from dsprune.tasks import build_task
from dsprune.tasks.benchmarks.glue import GLUE
from dsprune.tasks.benchmarks.squad import SQUAD
from tests.tasks.conftest import Write

SMALL = ("cola", "mrpc", "stsb", "rte", "wnli")


OTHERS = (*SQUAD, "conll2003")


def recipe(task: str, method: str = "cofi") -> RunConfig:
    return load_config(f"{method}_{task}", method_options=method_options)


def test_there_is_a_recipe_for_every_task() -> None:
    for method in ("cofi", "grain"):
        assert {f"{method}_{name}" for name in (*GLUE, *OTHERS)} <= set(list_recipes())


@pytest.mark.parametrize("name", GLUE)
def test_recipes_hold_the_values_of_the_paper(name: str) -> None:
    config = recipe(name)
    assert build_task(config.task, config.data, seed=config.seed).name == name
    assert config.model.name == "google-bert/bert-base-uncased"
    assert (config.batch.size, config.task.max_length) == (32, 128)
    assert config.teacher.lr == config.prune.lr == config.recover.lr == 2e-5
    assert config.prune.target == 0.95
    assert (config.method.name, config.method.options.lr) == ("cofi", 0.01)
    epochs = (config.method.options.distill_phase, config.method.options.warmup, config.prune.duration)
    wanted = (4, 20, 100) if name in SMALL else (1, 2, 20)
    assert epochs == tuple(Duration(count, "epochs") for count in wanted)
    assert config.recover.duration == Duration(20, "epochs")
    assert config.distill.match == ("monotone" if name in SMALL else "free")
    assert (config.deepspeed.student, config.deepspeed.teacher) == ("zero2", "teacher")
    assert config.output == f"runs/cofi_{name}"


def test_one_recipe_mixes_the_selection_of_one_method_with_the_distillation_of_another() -> None:
    mixed, grain, cofi = (
        load_config("mixed_sst2", method_options=method_options),
        recipe("sst2", "grain"),
        recipe("sst2"),
    )
    assert mixed.method == grain.method
    assert mixed.distill == cofi.distill != grain.distill


FIVE_LINES = """
model.name = "google-bert/bert-base-uncased"
task.name = "text_classification"
data.path = "reviews"
data.columns = {text = "review", label = "stars"}
prune.target = 0.6
"""


def test_five_lines_are_a_recipe(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "validation"):
        write(tmp_path / "reviews" / f"{split}.csv", {"review": ["fine", "dull", "so so"], "stars": [5, 1, 3]})
    (tmp_path / "reviews.toml").write_text(FIVE_LINES)
    monkeypatch.chdir(tmp_path)
    config = load_config("reviews.toml", method_options=method_options)
    assert (config.output, config.method.name, config.prune.target) == ("runs/reviews", "cofi", 0.6)
    task = build_task(config.task, config.data, seed=config.seed)
    assert (task.labels, task.primary) == (("1", "3", "5"), "accuracy")


@pytest.mark.parametrize(
    ("method", "task", "metric"),
    [("cofi", "text_classification", "accuracy"), ("grain", "token_classification", "f1")],
)
def test_recipes_for_data_of_ones_own(method: str, task: str, metric: str, tmp_path: Path, write: Write) -> None:
    config = recipe(task, method)
    assert (config.task.name, config.method.name) == (task, method)
    with pytest.raises(ConfigError, match=r"give data.dataset, or a local folder as data.path"):
        build_task(config.task, config.data, seed=config.seed)
    rows = {"text": ["a", "b"], "tokens": [["a", "b"]] * 2, "label": ["x", "y"], "tags": [["B-X", "O"]] * 2}
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.jsonl", rows)
    data = config.data.model_copy(update={"path": str(tmp_path)})
    assert build_task(config.task, data, seed=config.seed).primary == metric


@pytest.mark.parametrize("name", SQUAD)
def test_squad_as_in_the_paper(name: str) -> None:
    config = recipe(name)
    assert build_task(config.task, config.data, seed=config.seed).name == name
    assert (config.task.max_length, config.task.stride, config.batch.size, config.prune.lr) == (384, 128, 16, 3e-5)
    epochs = (config.method.options.distill_phase, config.method.options.warmup, config.prune.duration)
    assert epochs == tuple(Duration(count, "epochs") for count in (1, 2, 20))
    # The authors' 0.1 weighs the mean of start and end.
    assert (config.distill.logits * 2, config.distill.layers, config.prune.target) == (0.1, 0.9, 0.95)


def test_entities_on_the_schedule_of_small_tasks() -> None:
    config = recipe("conll2003")
    assert build_task(config.task, config.data, seed=config.seed).name == "conll2003"
    assert config.prune.duration == Duration(100, "epochs")
    assert config.distill.match == "monotone"


@pytest.mark.parametrize("name", [*GLUE, *OTHERS])
def test_grain_prunes_all_tasks_alike(name: str) -> None:
    config = recipe(name, "grain")
    assert build_task(config.task, config.data, seed=config.seed).name == name
    assert config.model.name == "google-bert/bert-base-uncased"
    assert (config.task.max_length, config.task.stride) == (384 if name in SQUAD else 128, 128)
    options = config.method.options
    assert (config.method.name, options.alpha, options.beta) == ("grain", 0.3, 0.998)
    assert (options.start, options.end, options.probe_every) == (0.2, 0.4, 1)
    assert (config.prune.target, config.prune.embedding_rank, config.prune.start) == (0.95, 192, "pretrained")
    twice = name == "conll2003"
    assert config.prune.duration == Duration(40 if twice else 20, "epochs")
    assert (config.prune.lr, config.prune.weight_decay, config.prune.warmup) == (1e-4 if twice else 3e-5, 0.01, 0.1)
    distill = config.distill
    assert (distill.logits, distill.logit_scale, distill.temperature) == (1.0, "none", 8.0)
    assert (distill.layers, distill.match, distill.projection) == (1.0, "fixed", "separate")
    assert distill.teacher_layers == tuple(range(0, 13, 2))
    assert config.recover.duration == Duration(0, "steps")
    assert config.output == f"runs/grain_{name}"


@pytest.mark.parametrize("name", ["mnli", "qqp", "squad", "sst2"])
def test_mlpruning_has_both_steps_as_published(name: str) -> None:
    config = recipe(name, "mlpruning")
    assert build_task(config.task, config.data, seed=config.seed).name == name
    assert (config.method.name, config.method.options.lr, config.method.options.init) == ("mlpruning", 0.01, 10.0)
    assert (config.prune.target, config.prune.duration) == (0.5, Duration(20, "epochs"))
    assert (config.blocks.target, config.blocks.duration) == (0.6, Duration(20, "epochs"))
    assert (config.distill.attentions, config.distill.projection) == (0.9, "none")


@pytest.mark.parametrize("method", ["cofi", "grain", "mlpruning"])
def test_every_method_prunes_a_decoder_on_the_same_schedule(method: str) -> None:
    config = recipe("wikitext2", method)
    assert build_task(config.task, config.data, seed=config.seed).name == "lm"
    assert config.method.name == method
    assert (config.model.from_scratch, config.prune.start, config.prune.target) == (True, "teacher", 0.5)
    assert config.prune.duration.count + config.recover.duration.count == 15
    assert config.data.evals == ("validation", "test")
