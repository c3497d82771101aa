"""Loops over coefficients compiled for one CPU core by Numba: in one pass over memory what torch does in many operations.

Back-substitution of a small network is bound by passes over coefficients that a core's second-level cache no longer holds, more
than by products. What each function here computes its callers can also have of torch's operations, which they use for
gradients and on GPUs; the two agree but for rounding. The loops hold no lock of the interpreter, so the threads of several
tiles do not wait for each other; and they take every member and image alone, in an order that depends on shapes only, so what
else is in a call changes no bits. (Whether a convolution is passed by them does depend on it: ``BoundConvolution.sparse_pays``
asks for all members and images of a tile.)

A function is compiled when it is first called for a dtype, which takes a second or two, and then kept beside this file, or in
the user's cache where that cannot be written.

In the loops arrays of P members are read at ``p % len``: what all members share has one entry.
"""

import torch

from evocert.bounds.compiled.activations import passed, piecewise
from evocert.bounds.compiled.box import differences, magnitude_product, pair_products
from evocert.bounds.compiled.convolutions import share_of_nonzero, through_convolution
from evocert.bounds.compiled.loops import DTYPES, Parts, usable
from evocert.bounds.relaxation import SLOPES

__all__ = [
    "DTYPES",
    "Parts",
    "differences",
    "load",
    "magnitude_product",
    "pair_products",
    "passed",
    "piecewise",
    "share_of_nonzero",
    "through_convolution",
    "usable",
]


def load(dtype: torch.dtype) -> None:
    """Compiles everything for a dtype, or reads it from where it is kept: not needed, but then done, once a process.

    It takes half a second and some 60 MiB, most of them Numba itself; compiling takes four seconds.
    """
    with torch.no_grad():
        map_, row, one = torch.zeros(1, 1, 1, 2, 1, 1, 1, dtype=dtype), torch.zeros(1, 1, 1, 2, dtype=dtype), (1, 1)
        parts = (map_[:, :, :, :1],) * 4
        piecewise(row, row, row, SLOPES[0], 0.0)
        passed(map_, row, parts)
        differences(map_, torch.zeros(1, dtype=torch.long), torch.ones(1, 1, dtype=torch.long))
        magnitude_product(map_, parts[0])
        pair_products(map_, parts[0])
        share_of_nonzero(map_)
        through_convolution(map_, row, map_[0, 0, :, :1], one, (0, 0), one, parts, parts)
