import pytest
import torch
from torch import nn

from dsprune.distill import HiddenTap, layer_distances, layer_loss


def test_layer_loss_does_not_see_padding_and_adds_up_over_micro_batches():
    """Pitfall 11; unequal token counts still average over the whole batch."""
    student, teacher = torch.randn(2, 10, 4), torch.randn(2, 10, 4)
    whole = layer_loss(student, teacher, num_tokens=torch.tensor(10.0))
    expected = sum((student[i] - teacher[i]).square().mean() for i in range(2))
    torch.testing.assert_close(whole, expected)
    mean_tokens = torch.tensor(5.0)
    parts = [layer_loss(student[:, s], teacher[:, s], num_tokens=mean_tokens) for s in (slice(0, 3), slice(3, 10))]
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_distances_are_the_loss_of_every_pair():
    student, teacher = torch.randn(3, 7, 4), torch.randn(2, 7, 4)
    tokens = torch.tensor(7.0)
    distances = layer_distances(student, teacher, num_tokens=tokens)
    assert distances.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            expected = layer_loss(student[j : j + 1], teacher[i : i + 1], num_tokens=tokens)
            torch.testing.assert_close(distances[i, j], expected)


def test_distances_of_near_states_survive_autocast():
    teacher = torch.randn(2, 50, 16) * 10
    student, tokens = teacher.flip(0) + 0.05 * torch.randn(2, 50, 16), torch.tensor(50.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distances = layer_distances(student, teacher, num_tokens=tokens)
    torch.testing.assert_close(distances, layer_distances(student, teacher, num_tokens=tokens), rtol=0, atol=0)


def test_tap_packs_real_tokens_and_keeps_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tap = HiddenTap(model, ["1", "0"])
    x = torch.randn(2, 3, 4)
    out = model(x)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    states = tap.take(mask.flatten().nonzero().flatten())
    torch.testing.assert_close(states[0], out[mask.bool()])
    torch.testing.assert_close(states[1], model[0](x)[mask.bool()])
    with pytest.raises(KeyError):
        tap.take(torch.tensor([0]))
