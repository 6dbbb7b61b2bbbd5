"""The norm of a gradient from its rows' inner products, without forming it.

‖Σ_s g_s·a_sᵀ‖² = Σ_{s,s'} (a_s·a_s')(g_s·g_s'). Where the rows nearly cancel, the sum is far below
its terms and little but rounding is left of it, which could be too small a number and so too weak a
clip. Hence a floor: a norm is never taken to be less than what rounding lets one know.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 64
"""Units of rounding that a product of two inner products may be off, relative to its terms."""


def squared_norms_of_pairs(pairs: Tensor) -> Tensor:
    """Sums pair products to squared norms.

    Args:
        pairs: [batch, n, n] products (a_s·a_s')(g_s·g_s').

    Returns:
        [batch].
    """
    terms = pairs.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt().sum(1).pow(2)
    return floored(pairs.sum((1, 2)), terms)


def floored(norms: Tensor, terms: Tensor) -> Tensor:
    """Squared norms, but none below the rounding of the terms that they were summed from.

    The floor is reached only where the rows' norms sum to some hundred times the norm of their sum
    in float32 (a million in float64). There the norm is overstated, so the sample clipped harder.

    Args:
        norms: [batch] squared norms of sums of rows.
        terms: [batch] (Σ_s ‖a_s‖·‖g_s‖)².
    """
    return norms.maximum(ROUNDING * torch.finfo(norms.dtype).eps * terms)
