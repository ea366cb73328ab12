"""How long a sequence a family reads, against what its models can in fact look up."""

import pytest
import torch

from dsprune.arch import family_for
from tests.helpers.models import tiny_model


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra", "gpt2"])
def test_usable_positions_are_all_that_a_model_has(name):
    model = tiny_model(name)
    usable = family_for(model.config.model_type).usable_positions(model.config)
    assert usable == {"roberta": 38}.get(name, 40)
    ids = torch.full((1, usable + 1), 5)
    model(input_ids=ids[:, :-1], attention_mask=torch.ones_like(ids[:, :-1]))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_relative_positions_without_a_table_have_no_end():
    assert family_for("t5").usable_positions(tiny_model("t5").config) is None
