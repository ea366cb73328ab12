"""Every stage has its class, and those that train are the ones that are rehearsed."""

from dsprune.run.stages.table import STAGE_CLASSES, TRAINING_CLASSES
from dsprune.run_folder import STAGES, TRAINING_STAGES


def test_every_stage_has_a_class_of_its_name():
    assert {name: cls.name for name, cls in STAGE_CLASSES.items()} == {name: name for name in STAGES}


def test_stages_with_checkpoints_are_those_that_train():
    assert tuple(TRAINING_CLASSES) == TRAINING_STAGES
