"""Losses asked of the head, in engines: the same whatever stage, world size, accumulation and sharding."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.language import Language, build_language_trainer, language_losses, random_text
from tests.helpers.settings import TRAINED
from tests.helpers.training import under_autocast
from tests.helpers.world import run_world

pytestmark = pytest.mark.dist


@cache
def _reference(setup):
    return run_world(language_losses, 1, setup)[0]


VARIANTS = [
    pytest.param("llama-tied", 2, {"stage": 2, "accumulation": 2}, id="tied llama, zero2 x2 accumulating"),
    pytest.param(
        "llama-tied", 2, {"stage": 3, "activation_checkpointing": True}, id="tied llama, zero3 x2, recomputing"
    ),
    pytest.param("t5", 2, {"stage": 3, "teacher": "teacher_zero3"}, id="t5, zero3 x2, sharded teacher"),
    pytest.param("t5-spans", 2, {"stage": 2, "accumulation": 2}, id="span corruption, zero2 x2 accumulating"),
]


def _assert_same(ours, theirs):
    for step, (mine, reference) in enumerate(zip(ours, theirs, strict=True)):
        for part, value in reference.items():
            assert mine[part] == pytest.approx(value, rel=2e-5, abs=1e-6), f"step {step}, {part}"


@pytest.mark.parametrize(("model", "world_size", "changes"), VARIANTS)
def test_every_way_of_running_is_one_trajectory(model, world_size, changes):
    setup = Language(model)
    reference = _reference(setup)
    assert reference[-1]["logits"] > 0
    assert reference[-1]["labels"] > 0
    _assert_same(run_world(language_losses, world_size, setup.at(**changes))[0], reference)


@pytest.mark.parametrize(
    "setup",
    [
        Language("gpt2", taught=False),
        Language("llama", distill=(("logits", 1.0), ("top_k", 4), ("logit_scale", "none"))),
    ],
    ids=["nobody teaches", "top k"],
)
def test_sharded_is_whole(setup):
    sharded = setup.at(stage=3, teacher="teacher_zero3", accumulation=2)
    _assert_same(run_world(language_losses, 2, sharded)[0], _reference(setup))


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("llama-tied", {"stage": 2}),
        ("llama", {"stage": 3, "teacher": "teacher_zero3", "method": 1}),
        ("t5", {"stage": 3, "activation_checkpointing": True}),
    ],
)
def test_heads_work_under_autocast(model, changes):
    """Weights in fp32, hidden states in bf16."""
    ours = run_world(under_autocast, 2, language_losses, Language(model).at(**changes))[0]
    theirs = _reference(Language(model, method=changes.get("method")))
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine["total"] == pytest.approx(reference["total"], rel=0.05)
        assert mine["total"] != reference["total"], "nothing was cast"


def _by_all_logits(setup):
    """The first step's loss and gradients, and the same from whole logits."""
    trainer = build_language_trainer(setup)
    batch = trainer.batches.micro_batch(0, 0)
    student, distill = trainer.engine.module, trainer.engine.module.distill
    teacher_signal = trainer._teacher_signal(batch, [])
    loss, _, _ = student(batch.inputs, batch.labels, batch.num_targets, None, teacher_signal)
    weights = [p for p in student.parameters() if p.requires_grad]
    got = torch.autograd.grad(loss, weights)
    arguments = student.objective.task.arguments(student.model, batch.inputs, batch.labels)
    where = batch.labels != -100
    ours = student.model(**arguments).logits[where]
    with torch.no_grad():
        theirs = trainer.teacher.engine(**arguments).logits[where]
    temperature = distill.temperature
    log_ours, log_theirs = (F.log_softmax(x / temperature, -1) for x in (ours, theirs))
    by_logits = F.kl_div(log_ours, log_theirs, reduction="sum", log_target=True) * temperature**2
    by_labels = F.cross_entropy(ours, batch.labels[where], reduction="sum")
    whole = (distill.logits * by_logits + distill.labels * by_labels) / batch.num_targets
    expected = torch.autograd.grad(whole, weights)
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True) if b.norm() > 0)
    return loss.item(), whole.item(), worst


@pytest.mark.parametrize("method", range(len(TRAINED)), ids=[row.name for row in TRAINED])
@pytest.mark.parametrize("model", [pytest.param("llama-tied", marks=pytest.mark.slow), "t5"])
def test_every_method_prunes_a_language_model_the_same_way_everywhere(model, method):
    """Tied heads, recomputed activations, a sharded teacher; for GRAIN the probe pass goes through the head as well.

    Of an encoder-decoder layers of both stacks teach, each over its own tokens, and what is recomputed has the bias
    that layers share.
    """
    setup = Language(model, method=method)
    sharded = setup.at(stage=3, teacher="teacher_zero3", activation_checkpointing=True)
    reference = _reference(setup)
    _assert_same(run_world(language_losses, 2, sharded)[0], reference)
    assert reference[-1]["layers"] > 0


def _of_all_models():
    return {model: _by_all_logits(Language(model)) for model in ("llama", "llama-tied", "gpt2", "t5", "t5-spans")}


def test_the_loss_is_that_of_all_logits():
    for model, (loss, whole, worst) in run_world(_of_all_models, 1)[0].items():
        assert loss == pytest.approx(whole, rel=1e-5), model
        assert worst < 1e-4, model


def _predictions(setup, count):
    """What evaluation gathers from all ranks, of a split whose size no number of ranks divides."""
    from dsprune.engine.learning.evaluate import evaluate

    trainer = build_language_trainer(setup)
    trainer.engine.eval()
    gathered = {}

    class Keep:
        def score(self, predictions, data):
            gathered["all"] = predictions
            return {}

    task = "seq2seq" if setup.model == "t5" else "lm"
    data = random_text(task, count)
    evaluate(
        lambda inputs, labels: trainer.engine(inputs, labels)[0],
        Keep(),
        data,
        trainer.world,
        batch_size=2,
        before_batch=lambda: None,
    )
    return gathered["all"].numpy()


@pytest.mark.parametrize("model", ["llama", "t5"])
def test_every_example_is_evaluated_once_over_all_ranks(model):
    """For the T5 that is what it writes: texts of unequal lengths, under ZeRO-3, ranks in step."""
    setup = Language(model, taught=False)
    alone = run_world(_predictions, 1, setup, 7)[0]
    shared = run_world(_predictions, 2, setup.at(stage=3), 7)
    for predictions in shared:
        assert len(predictions) == 7
        torch.testing.assert_close(torch.tensor(predictions), torch.tensor(alone), rtol=1e-5, atol=1e-5)
    assert len(set(map(bytes, alone))) > 3
