"""Shapes from the headers of a model folder's files, whatever their format."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsprune.cli import main
from dsprune.consolidate.stored import check_stored_shapes, stored_shapes
from dsprune.errors import ArchitectureError, ConfigError
from dsprune.structure import analyze
from tests.helpers.models import ALL, tiny_model


def _write(folder, state, form):
    """A model's weights in one of the forms that are found beside a config.json."""
    names = sorted(state)
    if form == "safetensors":
        save_file(state, folder / "model.safetensors")
    elif form.startswith("pickle"):
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "pickle")
    else:
        halves = {f"part-{i}.safetensors": names[i::2] for i in range(2)}
        for part, held in halves.items():
            save_file({name: state[name] for name in held}, folder / part)
        places = {name: part for part, held in halves.items() for name in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("form", ["safetensors", "parts", "pickle", "pickle of torch 1.5"])
def test_every_form_tells_its_shapes(tmp_path, form):
    state = {"a.weight": torch.zeros(3, 4), "b.bias": torch.zeros(5, dtype=torch.float16), "c": torch.zeros(())}
    _write(tmp_path, state, form)
    assert stored_shapes(tmp_path) == {"a.weight": (3, 4), "b.bias": (5,), "c": ()}


def test_a_pickle_that_runs_something_is_refused(tmp_path):
    class Bad:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"a": Bad()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="holds more than weights"):
        stored_shapes(tmp_path)


@pytest.mark.parametrize("name", ALL)
def test_the_weights_of_every_family_fit_their_own_configuration(tmp_path, name):
    """As whole models, and as bare ones under a head."""
    model = tiny_model(name)
    structure = analyze(model)
    model.save_pretrained(tmp_path)
    check_stored_shapes("model", str(tmp_path), structure)
    name, *_ = (p.name for p in structure.params.values() if p.part == "encoder" and len(p.shape) == 2)
    state = {f"_orig_mod.{key}": value.clone() for key, value in model.state_dict().items()}
    state[f"_orig_mod.{name}"] = state[f"_orig_mod.{name}"][:-1].clone()
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ArchitectureError, match=f"{name} is "):
        check_stored_shapes("model", str(tmp_path), structure)


def test_names_of_a_bare_model_and_of_one_with_a_head_are_the_same_to_it(tmp_path):
    bare, headed = tiny_model("base"), tiny_model("bert")
    narrow = {name: value[:, :-1].clone() for name, value in headed.state_dict().items() if "dense.weight" in name}
    for model, state in (
        (headed, {name.removeprefix("bert."): value for name, value in narrow.items()}),
        (bare, narrow),
    ):
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(ArchitectureError, match=r"dense\.weight is \[32, 31\]"):
            check_stored_shapes("model", str(tmp_path), analyze(model))


def test_inspect_tells_what_is_pruned_already(tmp_path, capsys):
    """It took the sizes of the configuration for those of the model."""
    tiny_model("bert").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path)]) == 0
    assert "4 heads of 8" in capsys.readouterr().out
    narrow = {name: value[:24].clone() if "query" in name else value for name, value in weights.items()}
    save_file(narrow, tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path)]) == 65
    said = capsys.readouterr()
    assert not said.out
    assert "query.weight is [24, 32] in the file and [32, 32] by the configuration, and 3 more differ" in said.err
