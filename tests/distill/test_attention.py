import pytest
import torch

from dsprune.distill import AttentionTap, attention_loss
from dsprune.structure.layout import attention_map_modules
from tests.helpers.models import tiny_batch, tiny_model


def test_only_real_tokens_and_live_heads_count():
    student, teacher = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    heads = torch.tensor([1.0, 0.0, 1.0])
    pairs = torch.tensor(16.0 + 4.0)
    loss = attention_loss(student, teacher, mask=mask, heads=heads, num_pairs=pairs)
    live = [0, 2]
    squares = [
        (student[0, live] - teacher[0, live]).square(),
        (student[1, live, :2, :2] - teacher[1, live, :2, :2]).square(),
    ]
    expected = torch.cat([part.flatten() for part in squares]).mean()
    assert float(loss) == pytest.approx(float(expected))
    changed = student.clone()
    changed[:, 1] += 1
    changed[1, :, 2:] += 1
    changed[1, :, :, 2:] += 1
    assert torch.equal(attention_loss(changed, teacher, mask=mask, heads=heads, num_pairs=pairs), loss)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "deberta-v2"])
def test_the_tap_catches_the_maps_of_eager_attention(name):
    model = tiny_model(name)
    model.set_attn_implementation("eager")
    tap = AttentionTap(model, attention_map_modules(model)[::-1])
    batch = tiny_batch()
    expected = model(**batch, output_attentions=True).attentions
    second, first = tap.take()
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])
    assert tap.take() == [None, None]
