"""What the optimizer holds and how it steps: frozen weights, projections apart, AdamW's constants."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.models import tiny_model
from tests.helpers.runs import execute, ground, words
from tests.helpers.settings import ROWS
from tests.helpers.training import Setup, build_trainer
from tests.helpers.world import run_world

pytestmark = pytest.mark.dist


def _frozen_run(setup, folder):
    """Two steps with frozen embeddings; saved, and read back into an engine where they had been lost."""
    import deepspeed

    from dsprune.consolidate import open_checkpoint
    from dsprune.engine.checkpoints.reshard import load_resharded
    from dsprune.engine.zero.gather import whole

    trainer = build_trainer(setup)
    losses = [trainer.step(step).losses["total"] for step in range(2)]
    engine = trainer.engine
    held = {param for group in engine.basic_optimizer.param_groups for param in group["params"]}
    names = {name for name, param in engine.module.named_parameters() if not param.requires_grad}
    engine.save_checkpoint(str(folder / str(setup.stage)), tag="student", save_latest=False)
    saved = open_checkpoint(folder / str(setup.stage))
    weights = {name: saved.read(name).clone() for name in saved.names()}
    other = build_trainer(setup)
    lost = [other.engine.module.get_parameter(name) for name in names]
    with torch.no_grad(), deepspeed.zero.GatheredParameters(lost, modifier_rank=0):
        for param in lost:
            param.data.zero_()
    state = {"global_steps": 2, "global_samples": 16, "skipped_steps": 0, "loss_scaler": {}}
    order = {param: name for name, param in engine.module.named_parameters()}
    groups = [[order[p] for p in g["params"]] for g in engine.optimizer.param_groups] if setup.stage == 0 else []
    load_resharded(other.engine, folder / str(setup.stage) / "student", {**state, "groups": groups})
    loaded = {name: whole(other.engine.module, name) for name in weights}
    return losses, names, weights, loaded, any(not param.requires_grad for param in held)


@pytest.fixture(scope="module")
def unfrozen():
    def losses(setup):
        trainer = build_trainer(setup)
        return [trainer.step(step).losses["total"] for step in range(2)]

    return run_world(losses, 1, Setup(ROWS[0]))[0]


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 1), (2, 2), (3, 2)])
def test_frozen_embeddings_stay_under_every_stage_and_are_saved_with_the_rest(stage, ranks, tmp_path, unfrozen):
    """No optimizer holds them, the checkpoint does, and an engine of another shape gets them back from it."""
    setup = Setup(ROWS[0], stage=stage, frozen=True)
    losses, names, weights, loaded, held = run_world(_frozen_run, ranks, setup, tmp_path)[0]
    dense = dict(tiny_model("bert").named_parameters())
    tables = {"word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight"}
    expected = {f"model.bert.embeddings.{part}" for part in (*tables, "LayerNorm.weight", "LayerNorm.bias")}
    assert names == expected
    assert not held
    for name, value in weights.items():
        if name.startswith("model."):
            same = torch.equal(value, dense[name.removeprefix("model.")].detach())
            assert same is (name in expected), name
        assert torch.equal(loaded[name], value), name
    assert losses[0] == pytest.approx(unfrozen[0], rel=2e-5)
    assert losses[1] != pytest.approx(unfrozen[1], rel=1e-4)


def _groups(setup):
    trainer = build_trainer(setup)
    rates = []
    trainer.optim = trainer.optim.model_copy(update={"warmup": 0.5})
    for step in range(3):
        trainer.step(step)
        groups = trainer.engine.basic_optimizer.param_groups
        rates.append([group["lr"] for group in groups])
    return rates, [(group["betas"], group["eps"], group["weight_decay"]) for group in groups]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_projections_may_keep_their_rate_and_adam_takes_its_constants(stage):
    """GRAIN's code: projections join the optimizer after its schedule was made, and without weight decay."""
    row = replace(ROWS[1], distill={**ROWS[1].distill, "projection_rate": "constant"})
    rates, constants = run_world(_groups, 1, Setup(row, stage=stage, betas=(0.8, 0.9), epsilon=1e-6))[0]
    assert [rate[2] for rate in rates] == [1e-3] * 3
    assert [rate[0] for rate in rates] == [pytest.approx(1e-3 * (step + 1) / 3) for step in range(3)]
    assert constants == [((0.8, 0.9), 1e-6, decay) for decay in (0.01, 0.0, 0.0)]


def test_adam_steps_with_the_constants_that_it_is_given():
    from dsprune.engine.learning.student import adamw

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = adamw(model, lr=0.1, weight_decay=0.5, ds_config={}, betas=(0.5, 0.25), epsilon=1e-2)
    weight, bias = (param.detach().clone() for param in (model.weight, model.bias))
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    for param, before, decay in ((model.weight, weight, 0.5), (model.bias, bias, 0.0)):
        # After one step both moments, corrected for their start, are the gradient and its square.
        moved = before * (1 - 0.1 * decay) - 0.1 * param.grad / (param.grad.abs() + 1e-2)
        torch.testing.assert_close(param.detach(), moved)


@pytest.mark.slow
def test_a_whole_run_with_frozen_embeddings_exports_them_as_they_were(tmp_path):
    """Pruned under ZeRO-3 on two ranks, exported, recovered and exported again."""
    place = ground(tmp_path)
    gates = 'method.gates=["head", "attn", "ffn", "ffn_dim"]'  # a hidden gate would be folded into the tables
    frozen = ("prune.freeze_embeddings=true", "recover.freeze_embeddings=true")
    stages = 'stages=["prune", "consolidate", "recover"]'
    assert run_world(execute, 2, *words(place, place / "run", student="zero3"), stages, gates, *frozen) == [0, 0]
    dense = load_file(place / "dense" / "model.safetensors")
    for name in ("compact", "recovered"):
        ours = load_file(place / "run" / name / "model.safetensors")
        tables = [key for key in dense if key.startswith("embeddings.")]
        assert len(tables) == 5
        assert all(torch.equal(ours[f"bert.{key}"], dense[key]) for key in tables), name
    assert not torch.equal(ours["bert.pooler.dense.weight"], dense["pooler.dense.weight"])
