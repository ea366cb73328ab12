import json

import pytest
import torch
from safetensors.torch import load_file

from dsprune.consolidate.writer import SafetensorsStream

TENSORS = {"a": torch.randn(3, 5), "b": torch.randn(7), "empty": torch.zeros(0, 4), "c": torch.randn(2, 2, 2)}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_library_reads_what_is_streamed(tmp_path, dtype):
    with SafetensorsStream(tmp_path, SHAPES, dtype) as stream:
        for name, tensor in TENSORS.items():
            stream.write(name, tensor)
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor.to(dtype)) for name, tensor in TENSORS.items())


def test_large_models_are_split_with_an_index(tmp_path):
    with SafetensorsStream(tmp_path, SHAPES, torch.float32, max_bytes=64) as stream:
        for name, tensor in TENSORS.items():
            stream.write(name, tensor)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in TENSORS.values())
    assert len(set(index["weight_map"].values())) == 2
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], TENSORS[name])


def test_a_tensor_out_of_turn_or_missing_is_a_bug(tmp_path):
    stream = SafetensorsStream(tmp_path, SHAPES, torch.float32)
    with pytest.raises(AssertionError, match="was due"):
        stream.write("b", TENSORS["b"])
    with pytest.raises(AssertionError, match="were not written"):
        SafetensorsStream(tmp_path, SHAPES, torch.float32).finish()
