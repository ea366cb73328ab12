from __future__ import annotations

import pytest

from dsprune.config import Duration, RunConfig, list_recipes, load_config
from dsprune.methods import method_options
from dsprune.tasks import build_task
from dsprune.tasks.glue import GLUE

SMALL = ("cola", "mrpc", "stsb", "rte", "wnli")


def recipe(task: str) -> RunConfig:
    return load_config(f"cofi_{task}", method_options=method_options)


def test_there_is_a_recipe_for_every_task() -> None:
    assert {f"cofi_{name}" for name in GLUE} <= set(list_recipes())


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
