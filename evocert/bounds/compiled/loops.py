"""How a loop is compiled, and what it can take."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

# Sums in any order, and products and sums rounded together; but nothing that would let NaN or infinity pass for a number.
FASTMATH = {"contract", "reassoc", "nsz"}
DTYPES = (torch.float32, torch.float64)

# Of the relaxation of an activation: mean and half difference of its two lines' slopes, and of their offsets.
Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compile_it = partial(numba.njit, nogil=True, fastmath=FASTMATH, error_model="numpy")
    try:
        return compile_it(cache=True)(function)
    except RuntimeError:  # there is nowhere to keep it
        return compile_it()(function)


def usable(*tensors: Tensor) -> bool:
    """Whether these functions may take tensors: all of what they take, on a CPU, where no derivative of them is recorded."""
    if getattr(forward_ad, "_current_level", -1) >= 0:  # derivatives in forward mode, of whatever
        return False
    return all(
        t.device.type == "cpu" and t.dtype in DTYPES and not (t.requires_grad and torch.is_grad_enabled())
        for t in tensors
    )


def array(tensor: Tensor) -> np.ndarray:
    """The same memory if that is in order, else a copy."""
    return tensor.detach().contiguous().numpy()
