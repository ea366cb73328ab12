"""What the guard looks at before a checkpoint is committed."""

import pytest

from tests.helpers.settings import ROWS
from tests.helpers.training import Setup, build_trainer
from tests.helpers.world import run_world

pytestmark = pytest.mark.dist


def _spoil(padding):
    """Put NaN into the last value that this rank holds of the classifier's bias: 9 values, two shares of 5."""
    import torch

    from dsprune.engine.learning.commit_guard import check_before_commit
    from dsprune.errors import NumericsError

    trainer = build_trainer(Setup(ROWS[0], stage=3, family="token", task="conll2003"))
    trainer.step(0)
    optimizer = trainer.engine.optimizer
    bias = trainer.engine.module.model.classifier.bias
    for params, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for param in params:
            if param is bias and trainer.world.rank == 1:
                with torch.no_grad():
                    flat[offset + (4 if padding else 3)] = float("nan")
            offset += param.ds_tensor.ds_numel
    try:
        check_before_commit(trainer, 1)
    except NumericsError as error:
        return str(error)
    return "committed"


@pytest.mark.parametrize(
    ("padding", "verdict"),
    [(True, "committed"), (False, "prune step 1: weights are not finite: lower the learning rate")],
)
def test_padding_of_zero3_is_no_weight(padding, verdict):
    """DeepSpeed leaves the padding of uneven shares as it found the memory."""
    verdicts = run_world(_spoil, 2, padding)
    assert all(said.startswith(verdict) for said in verdicts), verdicts
