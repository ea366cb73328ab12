"""The global ranking, against rankings done by hand."""

import pytest
import torch

from dsprune.methods.ranking import Ranking, UnitGroups


def _group(score, price=1.0, mask=None, round_to=1):
    score = torch.tensor(score, dtype=torch.float32)
    mask = torch.ones_like(score) if mask is None else torch.tensor(mask, dtype=torch.float32)
    return UnitGroups(score, mask, torch.full(score.shape, price, dtype=torch.float64), round_to)


def prune_lowest(groups, budget, *, tied=None):
    ranking = Ranking(groups, tied=tied)
    return ranking.masks(ranking.prefix(budget))


def test_the_shortest_prefix_that_meets_the_budget_goes():
    groups = {"a": _group([[5.0, 1.0, 3.0]], 10), "b": _group([[2.0, 4.0]], 7)}
    masks = prune_lowest(groups, 17)
    assert masks["a"].tolist() == [[1, 0, 1]]
    assert masks["b"].tolist() == [[0, 1]]
    masks = prune_lowest(groups, 17.5)
    assert masks["a"].tolist() == [[1, 0, 0]]
    assert prune_lowest(groups, 0)["a"].tolist() == [[1, 1, 1]]


def test_what_is_gone_stays_gone_and_counts():
    groups = {"a": _group([[9.0, 1.0, 3.0, 2.0]], mask=[[0, 1, 1, 1]])}
    assert prune_lowest(groups, 2)["a"].tolist() == [[0, 0, 1, 1]]
    assert prune_lowest(groups, 0)["a"].tolist() == [[0, 1, 1, 1]]


def test_followers_go_with_the_last_of_their_leaders_and_count():
    groups = {
        "q": _group([[8.0, 9.0], [7.0, 6.0]]),
        "v": _group([[1.0, 2.0], [5.0, 3.0]]),
    }
    masks = prune_lowest(groups, 1, tied=("q", "v"))
    assert masks["v"].tolist() == [[0, 1], [1, 1]]
    assert masks["q"].tolist() == [[1, 1], [1, 1]]
    masks = prune_lowest(groups, 4, tied=("q", "v"))
    assert masks["q"].tolist() == [[0, 0], [1, 1]]
    assert masks["v"].tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("round_to", [2, 4])
def test_packs_leave_multiples(round_to):
    generator = torch.Generator().manual_seed(0)
    groups = {"a": UnitGroups(torch.rand(6, 16, generator=generator), torch.ones(6, 16), torch.ones(6, 16), round_to)}
    masks = prune_lowest({k: UnitGroups(g.score, g.mask, g.price.double(), round_to) for k, g in groups.items()}, 50)
    kept = masks["a"].sum(1)
    assert (kept % round_to == 0).all()
    assert 96 - 50 - round_to < kept.sum() <= 96 - 50
    # Within a group the best are kept.
    for score, mask in zip(groups["a"].score, masks["a"], strict=True):
        if 0 < mask.sum() < 16:
            assert score[mask == 1].min() > score[mask == 0].max()


def test_equal_scores_do_not_all_go_at_once():
    masks = prune_lowest({"a": _group([[0.0] * 10])}, 3)
    assert masks["a"].sum() == 7
