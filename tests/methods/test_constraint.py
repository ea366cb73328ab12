"""What holds CoFi's gates to their target: projection is exact, and ascent is what was published."""

import pytest
import torch

from dsprune.config import ShapeConfig
from dsprune.engine.learning.replica import Replica
from dsprune.methods import method_class
from dsprune.methods.constraint import MOST, SPAN, Projection, find_shift, relative
from dsprune.methods.hard_concrete import LOG_ALPHA_MAX, LOG_ALPHA_MIN, keep_probability
from dsprune.methods.noise import uniform_noise
from dsprune.methods.tracking import has_reached
from dsprune.structure import CostModel, analyze, shape_gates
from tests.helpers.models import tiny_model
from tests.helpers.plans import plan_for

CoFi = method_class("cofi")
EXACT = 1e-6
"""What single precision leaves of a share."""


def _cofi(*, target=0.6, warmup=40, shape=None, model="bert", **options):
    structure = analyze(tiny_model(model))
    shape = ShapeConfig(**(shape or {}))
    if shape.sizes:
        target = float(CostModel(structure).sparsity(shape_gates(structure, shape.sizes)))
    plan = plan_for(structure, "cofi", target, total=2 * warmup, per_epoch=10, shape=shape)
    return CoFi(structure, CoFi.Options(distill_phase="0 steps", warmup=f"{warmup} steps", **options), plan)


def _pull(method, step):
    """Gradients of the gates as of a task: most want to be open, some more than others, and all are noisy."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.Generator().manual_seed(100 + step)
    return {
        kind: -1e-3 * (torch.rand(gate.shape, generator=generator) + torch.randn(gate.shape, generator=noise))
        for kind, gate in method.gates(step).items()
    }


def _step(method, step, replica=None):
    replica = replica or Replica(method)
    gradients = _pull(method, step)
    replica.gates(step, torch.device("cpu"))
    replica.step(step, gradients)


def _gap(method, step):
    return float(method.expected_sparsity().detach()) - method.target_at(step)


@pytest.mark.parametrize("target", [0.3, 0.95])
@pytest.mark.parametrize(("warmup", "lr"), [(20, 0.2), (100, 0.01)])
def test_the_expected_sparsity_is_the_target_from_the_first_tenth_of_the_warm_up(target, warmup, lr):
    method = _cofi(target=target, warmup=warmup, lr=lr)
    for step in range(warmup + 5):
        _step(method, step)
        if step + 1 >= warmup // 10:
            assert abs(_gap(method, step + 1)) < EXACT, step
    assert float(method.budget.sparsity(method.select().hard())) >= target


def test_the_published_ascent_step_by_step():
    """Section 3.2: L = l1 (s - t) + l2 (s - t)^2, downhill in the log-alphas and uphill in l1 and l2, by AdamW."""
    method = _cofi(constraint="ascent", lr=0.05, multiplier_lr=0.03)
    alpha = {kind: value.detach().clone().requires_grad_() for kind, value in method.log_alpha.items()}
    linear, quadratic = (torch.zeros((), requires_grad=True) for _ in range(2))
    down = torch.optim.AdamW(alpha.values(), lr=0.05, weight_decay=0.0)
    up = torch.optim.AdamW([linear, quadratic], lr=0.03, weight_decay=0.0, maximize=True)
    for step in range(30):
        gradients = _pull(method, step)
        _step(method, step)
        noise = {kind: value.detach() for kind, value in _noise(method, step).items()}
        loss = _sampled(alpha, noise, gradients)
        share = method.budget.sparsity({kind: keep_probability(value.double()) for kind, value in alpha.items()})
        gap = share - 0.6 * min(1, step / 40)
        (loss + linear * gap + quadratic * gap**2).backward()
        for optimizer in (down, up):
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for value in alpha.values():
                value.clamp_(LOG_ALPHA_MIN, LOG_ALPHA_MAX)
    for kind, value in alpha.items():
        torch.testing.assert_close(method.log_alpha[kind], value, rtol=0, atol=1e-6)
    torch.testing.assert_close(method.multipliers["linear"], linear)
    torch.testing.assert_close(method.multipliers["quadratic"], quadratic)
    assert float(quadratic.detach()) > 0


def _noise(method, step):
    return uniform_noise({kind: tuple(a.shape) for kind, a in method.log_alpha.items()}, method.plan.seed, step)


def _sampled(alpha, noise, gradients):
    """A loss whose gradient in the sampled gates is given."""
    total = torch.zeros(())
    for kind, value in alpha.items():
        u = noise[kind].clamp(1e-6, 1 - 1e-6)
        gate = (torch.sigmoid(((u / (1 - u)).log() + value) * 1.5) * 1.2 - 0.1).clamp(0, 1)
        total = total + (gate * gradients[kind]).sum()
    return total


def test_the_way_back_by_hand():
    """a_i moves by shift * w_i, with w_i = |n_i| / sqrt(v_i) over its median, within a factor of SPAN."""
    method = _cofi(target=0.7, warmup=10, lr=0.1)
    for step in range(4):
        _step(method, step)
    before, optimizer = {kind: a.detach().clone().double() for kind, a in _alphas(method)}, method.optimizers()[0]
    leaves = {kind: value.clone().requires_grad_() for kind, value in before.items()}
    slopes = torch.autograd.grad(method.expected_sparsity(leaves), list(leaves.values()))
    moments = [optimizer.state[a]["exp_avg_sq"].double() for _, a in _alphas(method)]
    ratios = [n.abs() / v.sqrt().clamp(min=1e-30) for n, v in zip(slopes, moments, strict=True)]
    median = torch.cat([ratio.flatten() for ratio in ratios]).sort().values[(sum(r.numel() for r in ratios) - 1) // 2]
    method.constraint.restore(0.5, 1.0)
    shifts = []
    for (_, after), start, ratio in zip(_alphas(method), before.values(), ratios, strict=True):
        weight = (ratio / median).clamp(1 / SPAN, SPAN)
        inside = (after.detach() > LOG_ALPHA_MIN) & (after.detach() < LOG_ALPHA_MAX)
        shifts.append(((after.detach().double() - start) / weight)[inside])
    shift = torch.cat(shifts)
    assert float(shift.mean()) < 0
    torch.testing.assert_close(shift, shift.mean().expand_as(shift), rtol=0, atol=1e-4)
    assert float(method.expected_sparsity().detach()) == pytest.approx(0.5, abs=EXACT)


def test_ratios_over_their_median():
    ratio = torch.tensor([[0.0, 1.0, 2.0, 4.0, 1e9], [0.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert relative(ratio).tolist() == [[0.1, 0.5, 1.0, 2.0, 10.0], [1.0] * 5]


def _alphas(method):
    return method.log_alpha.items()


def test_of_units_that_are_worth_the_same_the_dear_one_goes():
    prices = torch.tensor([1.0, 10.0], dtype=torch.float64)
    alpha = {"unit": torch.full((2,), 2.0, requires_grad=True)}
    optimizer = torch.optim.AdamW(alpha.values(), lr=0.1)

    def expected(a):
        return 1 - (keep_probability(a["unit"]) * prices).sum() / 11

    constraint = Projection(alpha, expected, optimizer=optimizer, sizes=None)
    for _ in range(40):
        alpha["unit"].grad = torch.full((2,), -1e-3)
        optimizer.step()
        constraint.restore(0.5, 1.0)
    cheap, dear = keep_probability(alpha["unit"].detach()).tolist()
    assert cheap > 0.95
    assert dear == pytest.approx((0.5 * 11 - cheap) / 10, abs=1e-5)


def _flat(share):
    """Milliseconds by width, say: nothing is saved until a tenth is gone."""
    whole = torch.floor(share * 10)
    return (whole + ((share * 10 - whole) * 4 - 3).clamp(0, 1)) / 10


def test_a_cost_with_plateaus_is_met_without_gradients():
    generator = torch.Generator().manual_seed(3)
    alpha = {"unit": torch.randn(50, generator=generator).requires_grad_()}

    def expected(a):
        return _flat(1 - keep_probability(a["unit"].double()).mean())

    optimizer = torch.optim.AdamW(alpha.values(), lr=0.1)
    constraint = Projection(alpha, expected, optimizer=optimizer, sizes=None)
    flat = 0
    for target in torch.linspace(0.2, 0.9, 15).tolist():
        alpha["unit"].grad = torch.randn(50, generator=generator)
        optimizer.step()
        flat += not torch.autograd.grad(expected(alpha), alpha["unit"])[0].any()
        constraint.restore(target, 1.0)
        assert float(expected(alpha).detach()) == pytest.approx(target, abs=1e-5)
    assert flat > 0


@pytest.mark.parametrize("target", [0.05, 0.2, 0.5, 0.77, 0.95])
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0])
def test_the_shift_is_exact_and_monotone(target, spread):
    alpha = spread * torch.randn(200, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    alpha = alpha.clamp(LOG_ALPHA_MIN, LOG_ALPHA_MAX)

    def removed(shift):
        return 1 - float(keep_probability((alpha + shift).clamp(LOG_ALPHA_MIN, LOG_ALPHA_MAX)).mean())

    shift = find_shift(removed, target)
    assert removed(shift) == pytest.approx(target, abs=1e-10)
    assert find_shift(removed, target) == shift
    assert find_shift(removed, target + 0.001) < shift


def test_a_target_out_of_reach_keeps_the_order_of_units():
    method = _cofi(target=0.49, gates=("head",), warmup=4, lr=0.1)
    for step in range(8):
        _step(method, step)
    alpha = method.log_alpha["head"].detach().flatten().clone()
    assert float(method.expected_sparsity().detach()) < 0.48
    assert len(set(alpha.tolist())) > 2
    with torch.no_grad():
        method.log_alpha["head"].fill_(LOG_ALPHA_MIN)
        most = float(method.expected_sparsity())
        method.log_alpha["head"].fill_(LOG_ALPHA_MAX)
        least = float(method.expected_sparsity())
        method.log_alpha["head"].copy_(alpha.view(2, -1))
    assert float(method.expected_sparsity().detach()) == pytest.approx(least + MOST * (most - least), abs=EXACT)


def test_a_step_that_was_skipped_is_caught_up_with():
    method = _cofi(target=0.9, warmup=20, lr=0.05)
    for step in range(15):
        if step not in (5, 6, 7):
            _step(method, step)
            assert step < 1 or abs(_gap(method, step + 1)) < EXACT


@pytest.mark.parametrize("options", [{}, {"shape": {"uniform": True}}, {"constraint": "ascent", "multiplier_lr": 0.1}])
def test_what_is_resumed_is_what_was_never_stopped(options, tmp_path):
    one, other = (Replica(_cofi(lr=0.1, **options)) for _ in range(2))
    for step in range(6):
        _step(one.method, step, one)
    one.save(tmp_path / "state.safetensors")
    other.load(tmp_path / "state.safetensors")
    assert other.fingerprint() == one.fingerprint()
    assert other.method.metrics(6) == one.method.metrics(6)
    for step in range(6, 12):
        _step(one.method, step, one)
        _step(other.method, step, other)
    assert other.fingerprint() == one.fingerprint()


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        ("bert", {"ffn": 40, "layers": 1}),
        ("llama", {"hidden": 22, "heads": 2, "ffn": 20}),
        ("llama", {"uniform": True}),
        ("bert", {"uniform": True}),
    ],
)
def test_sizes_are_met_in_every_layer(model, shape):
    method = _cofi(model=model, shape=shape, warmup=10, lr=0.1, target=0.5)
    for step in range(14):
        _step(method, step)
        progress = min(1, (step + 1) / 10)
        shares = {kind: share.detach() for kind, share in method._expected_shares().items()}
        for kind, share in shares.items():
            if method.plan.shape.sizes:
                kept = method._counts(shape)[kind] / method.log_alpha[kind].shape[-1]
                aim = min(1 - (1 - kept) * progress, float(keep_probability(torch.tensor(LOG_ALPHA_MAX))))
                torch.testing.assert_close(share, torch.full_like(share, aim), rtol=0, atol=EXACT)
            else:
                torch.testing.assert_close(share, share.mean().expand_as(share), rtol=0, atol=EXACT)
        if not method.plan.shape.sizes and step:
            assert abs(_gap(method, step + 1)) < EXACT
    assert max(float(alpha.detach().std()) for _, alpha in _alphas(method)) > 0.2, "units still compete"


def test_a_projected_target_is_reached_whatever_rounding_leaves():
    method = _cofi(target=0.7, warmup=8, lr=0.1)
    assert not has_reached(method, 0, 0.0)
    for step in range(12):
        _step(method, step)
        assert has_reached(method, step + 1, 0.0) == (step + 1 >= 8)
