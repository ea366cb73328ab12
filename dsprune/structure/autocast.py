"""What autograd functions of our own do under `torch.autocast`: as torch's linears, and no more than they.

Autocast looks at torch's operators one by one. Inside a function with a backward pass of its own that gives a
forward in half precision and a backward, which runs outside of autocast, in two dtypes. So the input is cast before
such a function, as a linear's is, and inside autocast is off.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["autocast_input", "without_autocast"]


def _is_on(x: Tensor) -> bool:
    # The meta device computes nothing, and knows no autocast.
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def autocast_input(x: Tensor) -> Tensor:
    """The input of a linear as autocast hands it to torch's own; untouched where autocast is off, or in float64."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if _is_on(x) and x.dtype is not torch.float64 else x


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Turns autocast off, where it is on, for the device of `x`."""
    return torch.autocast(x.device.type, enabled=False) if _is_on(x) else nullcontext()
