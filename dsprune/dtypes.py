"""The number formats that weights can have: one table of what torch, DeepSpeed and safetensors call them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "NAMES", "PRECISIONS", "Name", "Precision", "names", "torch_dtype"]

Name = Literal["float32", "bfloat16", "float16"]
"""A format in torch's words."""
Precision = Literal["fp32", "bf16", "fp16"]
"""A format in DeepSpeed's words."""


class Dtype(NamedTuple):
    """One number format.

    Attributes:
        precision: in DeepSpeed's words.
        code: in the header of a safetensors file.
    """

    precision: Precision
    code: str


DTYPES: Mapping[str, Dtype] = {
    "float32": Dtype("fp32", "F32"),
    "bfloat16": Dtype("bf16", "BF16"),
    "float16": Dtype("fp16", "F16"),
}
"""By torch's names, which are those of the command line."""

NAMES: Mapping[str, str] = {word: name for name, dtype in DTYPES.items() for word in (dtype.precision, name)}
"""Torch's name by every word for it that DeepSpeed reads: `NAMES["bf16"] == NAMES["bfloat16"] == "bfloat16"`."""

PRECISIONS: Mapping[str, Precision] = {word: DTYPES[name].precision for word, name in NAMES.items()}
"""By every word for it that DeepSpeed reads: `PRECISIONS["bfloat16"] == PRECISIONS["bf16"] == "bf16"`."""


def torch_dtype(word: str) -> torch.dtype:
    """The format that torch's name or DeepSpeed's word stands for: `torch_dtype("bf16") is torch.bfloat16`.

    Raises:
        KeyError: neither of them.
    """
    import torch  # here, for the command line reads the names and need not wait for it

    found: torch.dtype = getattr(torch, NAMES[word])
    return found


def names() -> str:
    """The names in a sentence: `float32, bfloat16 or float16`."""
    *first, last = DTYPES
    return f"{', '.join(first)} or {last}"
