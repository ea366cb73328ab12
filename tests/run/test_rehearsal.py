"""The first step on two layers: taken for every stage, told where it fails, and without a trace where it does not."""

import contextlib
import gc
import io
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from dsprune.run.launch import load
from dsprune.run.preflight import preflight
from tests.helpers.folders import encoder_decoder_recipe, language_recipe, tiny_folder, tiny_recipe
from tests.helpers.runs import assert_same, execute, ground, words
from tests.helpers.world import run_to_the_end, run_world

pytestmark = pytest.mark.dist
AUTOCAST = {"zero_optimization": {"stage": 2}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


class _Enough(BaseException):
    """Ends a launch before its first stage."""


def _launch(recipe, *overrides, hook):
    """A launch whose rehearsal is `hook`, and that ends after it: exit code, and what was said. On every rank."""
    import dsprune.run.session as session
    from dsprune.cli import guarded
    from dsprune.run.launch import execute

    real, said = session.rehearse, io.StringIO()

    def rehearse(run):
        hook(real, run)
        raise _Enough

    session.rehearse = rehearse
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = guarded(lambda: execute(str(recipe), overrides))
    except _Enough:
        code = 0
    finally:
        session.rehearse = real
    return code, said.getvalue()


def _rehearse_all(cases):
    """Every case on this rank, one after the other."""
    return [_launch(*case, hook=lambda real, run: real(run)) for case in cases]


def _deep(folder: Path) -> str:
    """A model of four layers."""
    config = json.loads((folder / "dense" / "config.json").read_text())
    path = Path(shutil.copytree(folder / "dense", folder / "deep"))
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    return f"model.name={path}"


def _shape(folder: Path) -> tuple[str, ...]:
    """Sizes to end with, in the place of the recipe's target."""
    recipe = folder / "tiny.toml"
    recipe.write_text(recipe.read_text().replace("target = 0.5\n", ""))
    return "shape.layers=2", "shape.ffn=32"


def _and_target(folder: Path, *overrides: str) -> tuple[str, ...]:
    """And the target that these sizes imply, which two layers of such sizes do not meet."""
    findings = preflight(load(str(folder / "tiny.toml"), overrides), 1)
    return *overrides, f"prune.target={findings.budget.target:.4f}"


def _wide_teacher(folder: Path) -> str:
    """A teacher of other depth and width than the student."""
    path = Path(shutil.copytree(folder / "dense", folder / "wide"))
    labels = {0: "contradicts", 1: "follows"}
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80}
    vocabulary = json.loads((path / "config.json").read_text())["vocab_size"]
    config = BertConfig(**sizes, vocab_size=vocabulary, id2label=labels, label2id={n: i for i, n in labels.items()})
    BertForSequenceClassification(config).save_pretrained(path)
    return f"teacher.path={path}"


def _file(folder: Path, content: dict) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps(content))
    return f"deepspeed.student={path}"


FOUR_LAYERS = ("model.from_scratch=true", "prune.start=teacher")
WAYS = {
    "cofi, four layers of which two stay": (
        "cofi",
        lambda f: _and_target(
            f, _deep(f), *FOUR_LAYERS, *_shape(f), "prune.target_of=total", "deepspeed.student=zero2"
        ),
        "teacher, prune, recover",
    ),
    "cofi, 95% of what two layers have not": (
        "cofi",
        lambda f: (_deep(f), *FOUR_LAYERS, "prune.target=0.98", "prune.duration=40 steps", "batch.micro=1"),
        "teacher, prune, recover",
    ),
    "grain, bf16 under ZeRO-3, checkpointing, accumulating": (
        "grain",
        lambda f: (
            "deepspeed.student=zero3_bf16",
            "deepspeed.teacher=teacher_zero3_bf16",
            "student.activation_checkpointing=true",
            "batch.micro=1",
        ),
        "teacher, prune, recover",
    ),
    "grain, a given teacher of other sizes": (
        "grain",
        lambda f: (_wide_teacher(f), "distill.match=free", "recover.duration=0 steps"),
        "prune",
    ),
    "mlpruning, attention maps and blocks": (
        "mlpruning",
        lambda f: (_deep(f), *FOUR_LAYERS, "distill.teacher_layers=[0, 1, 2, 3, 4]", "deepspeed.student=zero1"),
        "teacher, prune, recover, blocks",
    ),
    "autocast": ("cofi", lambda f: (_file(f, AUTOCAST),), "teacher, prune, recover"),
}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Exit code and words of every way of running, on both ranks."""
    dense = tiny_folder(tmp_path_factory.mktemp("model") / "dense")
    cases = []
    for method, overrides, _ in WAYS.values():
        folder = tmp_path_factory.mktemp("way")
        shutil.copytree(dense, folder / "dense")
        cases.append((str(tiny_recipe(folder, method=method)), *overrides(folder)))
    folder = tmp_path_factory.mktemp("language")
    cases.append((str(language_recipe(folder)), "distill.top_k=5", "deepspeed.student=zero3"))
    folder = tmp_path_factory.mktemp("pairs")
    cases.append((str(encoder_decoder_recipe(folder, task="seq2seq", num_layers=4)), "deepspeed.student=zero2"))
    first, second = run_world(_rehearse_all, 2, cases, timeout=300)
    names = [*WAYS, "language", "pairs"]
    return {name: (ours, theirs) for name, ours, theirs in zip(names, first, second, strict=True)}


@pytest.mark.parametrize("name", [*WAYS, "language", "pairs"])
def test_every_way_of_running_is_rehearsed(rehearsed, name):
    (code, said), (other, _) = rehearsed[name]
    assert (code, other) == (0, 0), said
    stages = WAYS[name][2] if name in WAYS else "teacher, prune, recover"
    assert f"rehearsed the first step of {stages} on two layers in" in said


def _without(*words):
    """A launch that does not rehearse."""
    import dsprune.run.session as session

    session.rehearse = lambda run: None
    return execute(*words)


@pytest.mark.parametrize(("method", "student"), [("cofi", "zero2"), ("grain", "zero3")])
def test_a_run_is_the_run_that_was_not_rehearsed(tmp_path, method, student):
    """Bitwise, with dropout."""
    place = ground(tmp_path)
    runs = [tmp_path / "with", tmp_path / "without"]
    for run, launch in zip(runs, (execute, _without), strict=True):
        assert run_world(launch, 2, *words(place, run, method=method, student=student)) == [0, 0]
    assert_same(*runs)


def _held():
    """Bytes of all tensors that are alive, and every state that random numbers come from."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
    randomness = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    return sum(storages.values()), randomness


def _left_behind(recipe, *overrides):
    from transformers.integrations import is_deepspeed_zero3_enabled

    found = []

    def hook(real, run):
        real(run)  # what libraries keep once they were used
        before = _held()
        real(run)
        after = _held()
        found.extend([after[0] - before[0], before[1] == after[1], is_deepspeed_zero3_enabled()])

    code, said = _launch(recipe, *overrides, hook=hook)
    assert code == 0, said
    return found


@pytest.mark.parametrize("student", ["zero3_bf16", pytest.param("zero2", marks=pytest.mark.slow)])
def test_nothing_is_left_of_it(tmp_path, student):
    """Not a byte: DeepSpeed itself would keep whole engines of ZeRO-3, of every stage, until the run ends."""
    recipe = tiny_recipe(tmp_path, method="mlpruning")
    for more, same, partitions in run_world(_left_behind, 2, recipe, f"deepspeed.student={student}"):
        assert more == 0
        assert same
        assert not partitions
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def _broken(where, ranks, *words):
    """A gated linear whose backward pass fails on some ranks, as it did under autocast; or a loss that is no number."""
    import os

    from dsprune.engine.learning.trainer import Trainer
    from dsprune.structure import kernels

    def fail(ctx, *grads):
        raise RuntimeError("expected m1 and m2 to have the same dtype\nand more lines")

    if where == "kernel" and int(os.environ["RANK"]) in ranks:
        kernels._GatedLinear.backward = staticmethod(fail)
    if where == "loss":
        real = Trainer._micro_step
        Trainer._micro_step = lambda *args, **kwargs: {
            name: part * torch.nan for name, part in real(*args, **kwargs).items()
        }
    return execute(*words)


@pytest.mark.parametrize("ranks", [(0, 1), (1,)], ids=["both ranks", "one rank"])
def test_what_fails_at_the_first_gated_step_fails_before_any_stage(tmp_path, ranks):
    """On one rank alone it must not leave the other waiting."""
    recipe = tiny_recipe(tmp_path)
    ending = run_to_the_end(_broken, 2, "kernel", ranks, str(recipe), _file(tmp_path, AUTOCAST), timeout=60)
    assert ending.codes == [64, 64], ending.log
    (line,) = (line for line in ending.log.splitlines() if line.startswith("error: "))
    # DeepSpeed's engine runs the backward pass, and yet does not refuse anything: the kernel is ours.
    assert "stage 'prune' would fail at its first step: RuntimeError: expected m1 and m2 to have" in line
    assert "ds.json (zero_optimization.stage = 2, torch_autocast)" in line
    assert "DeepSpeed refuses" not in ending.log
    assert "and more lines" not in ending.log
    assert "Traceback" not in ending.log
    assert f"the traceback is in {tmp_path / 'run' / 'failures' / f'rehearsal-rank{ranks[0]}.txt'}" in line
    for rank in ranks:
        kept = tmp_path / "run" / "failures" / f"rehearsal-rank{rank}.txt"
        assert "and more lines" in kept.read_text()
    assert not (tmp_path / "run" / "teacher").exists()


REFUSED = {
    "prescale_gradients": {"zero_optimization": {"stage": 2}, "prescale_gradients": True},
    "zero_quantized_weights": {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_deepspeed_refuses_is_no_bug_of_ours_and_no_fault_of_the_model(tmp_path, key):
    """Its assertions, and what it says of the machine while a model is made under ZeRO-3."""
    recipe = str(tiny_recipe(tmp_path))
    ((code, said),) = run_world(_rehearse_all, 1, [(recipe, _file(tmp_path, REFUSED[key]))])[0]
    assert code == 64, said
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert key in line
    assert "cannot load model" not in line


def test_numbers_that_are_none_are_told_before_any_stage(tmp_path):
    recipe = tiny_recipe(tmp_path)
    ending = run_to_the_end(_broken, 2, "loss", (), str(recipe), timeout=60)
    assert ending.codes == [66, 66], ending.log
    assert "rehearsal of stage 'teacher' step 0: not finite on rank 0: losses" in ending.log
    assert json.loads((tmp_path / "run" / "numerics.json").read_text())["ranks"]
    assert not (tmp_path / "run" / "teacher").exists()
