"""Which layers learn from which, where a model has an encoder and a decoder, and over which tokens."""

from __future__ import annotations

import pytest
import torch

from dsprune.engine.learning.trainer import LayerMatcher
from tests.helpers.language import Language, build_language_trainer
from tests.helpers.world import run_world

STACKS = (0, 0, 0, 1, 1)
"""Three layers of an encoder, two of a decoder."""


@pytest.mark.parametrize("rule", ["free", "monotone"])
def test_a_match_never_crosses_from_one_stack_to_the_other(rule):
    matcher = LayerMatcher(rule, (0, 1, 3, 4, 5), (0, 2, 3, 4), STACKS)
    # Between unlike stacks the distance is 0, the smallest there is; the first row is that of the embeddings.
    matcher.distances = torch.tensor([[9.0, 9, 0, 0], [1.0, 5, 0, 0], [2.0, 1, 0, 0], [0.0, 0, 3, 2], [0.0, 0, 9, 1]])
    expected = {"free": [4, 0, 1, 3, 3], "monotone": [4, 0, 1, 2, 3]}
    assert matcher.match(None) == expected[rule]


def test_a_dead_layer_leaves_its_own_stack_unmatched():
    matcher = LayerMatcher("fixed", (1, 3, 4, 5), (0, 1, 2, 3, 4), STACKS)
    gates = {"ffn": torch.tensor([1.0, 1, 0, 1, 1]), "ffn_dim": torch.ones(5, 4)}
    assert matcher.match(gates) == [0, -1, 3, 4]


def test_student_and_teacher_of_unlike_depth_are_matched_by_height():
    matcher = LayerMatcher("fixed", (3, 6, 9, 12), (0, 1, 2, 4, 5), partners=(2, 3, 5, 6))
    assert matcher.match(None) == [1, 2, 3, 4]
    assert LayerMatcher("fixed", (3, 6), (0, 2), partners=(2, 3)).match(None) == [-1, 1]
    matcher = LayerMatcher("free", (0, 2, 6), (0, 1, 2, 3), (0, 0, 0, 0, 1, 1), None, (0, 1, 3), (0, 0, 1, 1))
    assert matcher.match(None) == [4, 0, 2]


@pytest.mark.parametrize("rule", ["random", "quarters"])
def test_only_the_layers_that_are_drawn_teach_and_each_step_draws_anew(rule):
    matcher = LayerMatcher("free", range(1, 13), range(12), draw=rule, seed=3)
    matcher.distances = torch.rand(12, 12)
    matches = [matcher.match(None, step) for step in range(30)]
    assert all(2 <= sum(j >= 0 for j in match) <= 4 for match in matches)
    assert len({tuple(match) for match in matches}) > 10
    assert matches == [LayerMatcher.match(matcher, None, step) for step in range(30)]
    assert all(match[i] in (-1, int(matcher.distances[i].argmin())) for match in matches for i in range(12))


def _of_a_student_that_is_its_teacher():
    trainer = build_language_trainer(Language("t5", method=0))
    trainer.engine.module.model.load_state_dict(trainer.teacher.engine.module.state_dict())
    batch = trainer.batches.micro_batch(0, 0)
    teacher_signal = trainer._teacher_signal(batch, trainer.matcher.match(None))
    read, written = int(batch.inputs["attention_mask"].sum()), int((batch.labels != -100).sum())
    counts = [len(hidden) for hidden in teacher_signal.hidden]
    losses = trainer.step(0).losses
    return counts, (read, written), losses["layers"], trainer.matcher.distances.tolist()


@pytest.mark.dist
def test_layers_are_compared_over_the_tokens_of_their_own_stack():
    counts, (read, written), loss, distances = run_world(_of_a_student_that_is_its_teacher, 1)[0]
    assert read != written
    assert counts == [read, read, written, written]
    assert loss == pytest.approx(0, abs=1e-6)
    table = torch.tensor(distances)
    assert table.diagonal().abs().max() < 1e-4
    assert min(table[0, 1], table[1, 0], table[2, 3], table[3, 2]) > 1e-3
    assert not table[:2, 2:].any()
    assert not table[2:, :2].any()
