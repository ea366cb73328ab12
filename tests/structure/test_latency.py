"""Milliseconds of gates: against tables whose times are formulas, and what holds for any table."""

import json

import numpy as np
import pytest
import torch

from dsprune.errors import ConfigError
from dsprune.structure import analyze, by_head, gate_shapes, ones
from dsprune.structure.latency import LatencyCost, LatencyTable, speedup_budget
from dsprune.structure.latency.curves import monotone, piecewise
from tests.helpers.models import ALL, tiny_model
from tests.helpers.selections import awkward_gates, random_gates
from tests.speed.formula import (
    HERE,
    attention,
    base,
    draw_nested,
    formula_table,
    idle,
    neurons,
    noisy_table,
    stays,
)


@pytest.fixture(scope="module")
def bert():
    return analyze(tiny_model("bert"))


def _by_hand(structure, gates, empty):
    """The formulas of the table at the sizes that hard gates leave, a sublayer at a time."""
    full = {kind: gate.numpy() != 0 for kind, gate in {**ones(structure), **gates}.items()}
    width = full["hidden"].sum()
    total = stays(width)
    for i in range(structure.sizes.num_attn):
        values = by_head(torch.tensor(full["vo_dim"][i]), structure.sizes.num_groups).numpy()
        queries = by_head(torch.tensor(full["qk_dim"][i]), structure.sizes.num_groups).numpy()
        alive = full["head"][i] & values.any(-1)
        if not (full["attn"][i] and alive.any()):
            total += idle(width) if empty == "bias" else 0
            continue
        sizes = queries[alive].sum(-1), values[alive].sum(-1)
        widest = max(map(max, sizes))
        total += attention(alive.sum(), *map(sum, sizes), max(2, widest), width, structure.sizes.head_dim)
    for i in range(structure.sizes.num_ffn):
        count = full["ffn_dim"][i].sum()
        if full["ffn"][i] and count:
            total += neurons(count, width)
        else:
            total += idle(width) if empty == "bias" else 0
    return total


def _without_rows(gates):
    return {kind: gate for kind, gate in gates.items() if kind not in ("attn_row", "ffn_row", "pooler")}


@pytest.mark.parametrize("empty", ["identity", "bias"])
def test_a_hand_made_table_gives_what_its_formulas_give(bert, empty):
    """Hard gates of every kind but rows, ragged heads and empty sublayers among them."""
    cost = LatencyCost(bert, formula_table(bert), empty=empty)
    cases = {f"random {seed}": random_gates(bert, seed) for seed in range(12)} | dict(awkward_gates(bert))
    for name, gates in cases.items():
        gates = _without_rows(gates)
        assert float(cost.milliseconds(gates)) == pytest.approx(_by_hand(bert, gates, empty), rel=1e-9), name
    assert cost.dense == pytest.approx(_by_hand(bert, {}, empty))
    assert float(cost.milliseconds({})) == pytest.approx(cost.dense)


def test_measured_points_are_met_exactly(bert):
    """Noise that is monotone already is not smoothed: each time in the table is that of its gates."""
    table = formula_table(bert)
    cost = LatencyCost(bert, table)
    for name, kind, fine in (("attention", "attn", "head"), ("ffn", "ffn", "ffn_dim")):
        for row, units in enumerate(table.parts[name].units):
            for column, width in enumerate(table.hidden):
                gates = ones(bert, ("attn", "ffn", fine, "hidden"))
                gates["attn"][:], gates["ffn"][:] = 0, 0
                gates[kind][1], gates[fine][1, units:], gates["hidden"][width:] = 1, 0, 0
                given = float(cost.milliseconds(gates)) - table.stays[column]
                assert given == pytest.approx(table.parts[name].ms[row][column], rel=1e-12)


def test_expected_gates_give_expected_times(bert):
    """Whole heads, neurons and sublayers that are there by chance: the formulas are linear in their numbers."""
    cost = LatencyCost(bert, formula_table(bert), empty="bias")
    generator = torch.Generator().manual_seed(0)
    gates = {
        kind: torch.rand(shape, generator=generator, dtype=torch.float64)
        for kind, shape in gate_shapes(bert.sizes).items()
        if kind in ("head", "attn", "ffn", "ffn_dim")
    }
    width, dims = bert.sizes.hidden, bert.sizes.head_dim
    expected = stays(width)
    for i in range(2):
        heads, some = float(gates["head"][i].sum()), 1 - float((1 - gates["head"][i]).prod())
        there = float(gates["attn"][i])
        units = attention(heads, heads * dims, heads * dims, dims, width, dims) - base(width)
        expected += there * (some * base(width) + units) + (1 - there * some) * idle(width)
        count, some = float(gates["ffn_dim"][i].sum()), 1 - float((1 - gates["ffn_dim"][i]).prod())
        there = float(gates["ffn"][i])
        units = neurons(count, width) - base(width)
        expected += there * (some * base(width) + units) + (1 - there * some) * idle(width)
    assert float(cost.milliseconds(gates)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "deberta-v2"])
def test_gradients_are_those_of_finite_differences(name):
    structure = analyze(tiny_model(name))
    cost = LatencyCost(structure, formula_table(structure), empty="bias")
    generator = torch.Generator().manual_seed(1)
    gates = {
        kind: (0.3 + 0.6 * torch.rand(shape, generator=generator, dtype=torch.float64)).requires_grad_()
        for kind, shape in gate_shapes(structure.sizes).items()
    }
    found = torch.autograd.grad(cost.milliseconds(gates), list(gates.values()), materialize_grads=True)
    slopes = dict(zip(gates, found, strict=True))
    gates = {kind: gate.detach() for kind, gate in gates.items()}
    for kind, gate in gates.items():
        direction = torch.rand(gate.shape, generator=generator, dtype=torch.float64)
        step = 1e-6 * direction
        there, back = (float(cost.milliseconds({**gates, kind: gate + sign * step})) for sign in (1, -1))
        assert (there - back) / 2e-6 == pytest.approx(float((slopes[kind] * direction).sum()), rel=1e-4, abs=1e-9), kind
        if kind != "pooler":
            assert (slopes[kind] >= 0).all(), kind


@pytest.mark.parametrize("name", ALL)
def test_closing_gates_never_costs_time(name):
    """Whatever was measured: every family, tables of noise, random choices each within the one before."""
    structure = analyze(tiny_model(name))
    shapes = gate_shapes(structure.sizes)
    for seed in range(2):
        table = noisy_table(structure, np.random.default_rng(seed))
        for empty in ("identity", "bias"):
            cost = LatencyCost(structure, table, empty=empty)
            last = float(cost.milliseconds({}))
            for level in draw_nested(structure, shapes, seed):
                gates = {kind: torch.tensor(open_).double() for kind, open_ in level.items()}
                now = float(cost.milliseconds(gates))
                assert -1e-9 <= now <= last + 1e-9
                last = now


def test_what_the_dense_model_takes_is_its_own(bert):
    """Stock classes may be slower than the compact ones that all parts are measured in."""
    table = formula_table(bert)
    cost = LatencyCost(bert, table.model_copy(update={"whole": 2 * table.whole}))
    assert cost.dense == 2 * table.whole
    assert cost.dense / float(cost.milliseconds({})) == pytest.approx(2)
    assert speedup_budget(cost, 1.5).excess(1 / 3) < 0


def test_floors(bert):
    """What is left when all is closed: the rest of the model, and with it biases and norms where those stay."""
    gates = {kind: torch.zeros(shape) for kind, shape in gate_shapes(bert.sizes).items()}
    for kind in ("hidden", "pooler"):
        gates[kind][0] = 1
    table = formula_table(bert)
    assert float(LatencyCost(bert, table).milliseconds(gates)) == pytest.approx(stays(1))
    assert float(LatencyCost(bert, table, empty="bias").milliseconds(gates)) == pytest.approx(stays(1) + 4 * idle(1))


def test_prices_are_the_way_from_none_to_all(bert):
    cost = LatencyCost(bert, formula_table(bert))
    width, prices = bert.sizes.hidden, {k: cost.price(k) for k in ("ffn_dim", "vo_dim", "hidden", "attn")}
    assert {kind: tuple(price.shape) for kind, price in prices.items()} == {
        kind: gate_shapes(bert.sizes)[kind] for kind in prices
    }
    torch.testing.assert_close(prices["ffn_dim"], torch.full_like(prices["ffn_dim"], width / 256), rtol=0.02, atol=0)
    whole = attention(4, 32, 32, 8, width, 8)
    torch.testing.assert_close(prices["attn"], torch.full_like(prices["attn"], whole))
    slope = float(cost.milliseconds({"hidden": torch.cat([torch.ones(31), torch.zeros(1)])}))
    torch.testing.assert_close(
        prices["hidden"], torch.full_like(prices["hidden"], cost.dense - slope), rtol=0.02, atol=0
    )
    assert (prices["vo_dim"] > 0).all()


def test_what_falls_is_smoothed_and_said(bert):
    table = formula_table(bert)
    part = table.parts["ffn"]
    times = [list(row) for row in part.ms]
    times[2][3], times[1][3] = 2.0, 3.0
    bad = table.model_copy(update={"parts": {**table.parts, "ffn": part.model_copy(update={"ms": times})}})
    assert table.smoothed() == []
    (line,) = bad.smoothed()
    assert line.startswith("ffn at ")
    assert "a larger size took less" in line
    cost = LatencyCost(bert, bad)
    fewer = torch.ones(2, 64)
    fewer[:, 16:] = 0
    assert cost.milliseconds({"ffn_dim": fewer}) <= cost.dense
    np.testing.assert_allclose(monotone(np.array([1.0, 3.0, 2.0, 4.0])), [1, 2.5, 2.5, 4])


def test_lines_between_points_are_straight_and_level_outside():
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 9.0], dtype=torch.float64)
    torch.testing.assert_close(piecewise([1, 3], [2.0, 4.0], x), torch.tensor([2.0, 2, 3, 4, 4], dtype=torch.float64))


def test_a_table_is_read_as_it_was_written(bert, tmp_path):
    table = formula_table(bert)
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table


def _hole(tree):
    tree["parts"]["ffn"]["ms"][1][2] = None


def _not_a_number(tree):
    tree["parts"]["attention"]["ms"][0][0] = float("nan")


def _short_row(tree):
    tree["parts"]["ffn"]["ms"][1].pop()


def _missing_row(tree):
    tree["parts"]["ffn"]["ms"].pop()


def _not_rising(tree):
    tree["hidden"] = [1, 16, 8, 32]


def _unknown_key(tree):
    tree["milliseconds"] = 3


def _other_format(tree):
    tree["format"] = 2


BAD = {
    _hole: "parts.ffn.ms.1.2",
    _not_a_number: "parts.attention.ms.0.0",
    _short_row: "parts.ffn.ms has 3 times for 4 hidden widths",
    _missing_row: "parts.ffn.ms has 2 rows for 3 numbers of units",
    _not_rising: "hidden does not rise",
    _unknown_key: "milliseconds",
    _other_format: "format",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_bad_tables_are_refused_in_one_line(bert, tmp_path, spoil):
    tree = formula_table(bert).model_dump(mode="json")
    spoil(tree)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError) as caught:
        LatencyTable.load(path)
    (line,) = caught.value.mistakes
    assert str(path) in line
    assert BAD[spoil] in line
    assert "\n" not in line


@pytest.mark.parametrize("content", [None, "{", "[1, 2]"])
def test_what_is_no_table_is_refused(tmp_path, content):
    path = tmp_path / "table.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"table\.json"):
        LatencyTable.load(path)


def test_tables_of_another_place_are_refused_by_name(bert):
    table = formula_table(bert)
    table.check(bert, HERE.model_copy(update={"torch": "2.14.0"}), "t.json")
    for name, value in {
        "device": "another",
        "dtype": "bfloat16",
        "batch": 8,
        "length": 64,
        "runtime": "compile",
    }.items():
        with pytest.raises(ConfigError) as caught:
            table.check(bert, HERE.model_copy(update={name: value}), "t.json")
        (line,) = caught.value.mistakes
        assert f"{name} {getattr(HERE, name)}, not {value}" in line
        assert "latency.allow_foreign" in line


def test_tables_of_another_model_are_refused(bert):
    other = analyze(tiny_model("bert-deep"))
    with pytest.raises(ConfigError, match=r"of another model \(hidden 32, not 48"):
        formula_table(bert).check(other, HERE, "t.json")
    with pytest.raises(ConfigError, match="family bert, not"):
        LatencyCost(analyze(tiny_model("roberta")), formula_table(bert))


def test_a_speedup_is_a_budget(bert):
    cost = LatencyCost(bert, formula_table(bert))
    budget = speedup_budget(cost, 4)
    assert budget.share == 0.25
    assert budget.dense == cost.dense
    assert budget.describe() == "the milliseconds of a batch of 4 at length 16 on a device (float32)"
    assert float(budget.sparsity({})) == pytest.approx(0)
    torch.testing.assert_close(budget.prices(("ffn_dim",))["ffn_dim"], cost.price("ffn_dim"))
    closed = budget.floor(("head", "ffn_dim", "hidden"))
    assert closed == pytest.approx(stays(1))
    fastest = cost.dense / closed
    reachable = (
        rf"prune\.speedup = 1000 in the milliseconds of a batch .* out of reach: .*{fastest:.1f}x as fast at most"
    )
    with pytest.raises(ConfigError, match=reachable):
        speedup_budget(cost, 1000).check(closed, "{} at most")
    speedup_budget(cost, cost.dense / closed - 1e-6).check(closed, "{} at most")
    with pytest.raises(ConfigError, match=r"prune\.speedup = 0\.5: a speedup is 1 or more"):
        speedup_budget(cost, 0.5)
