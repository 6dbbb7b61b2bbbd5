"""Compiled kernels for processors: norms over segments of rows, matrix products, and noise.

Optional: each has a torch version beside its caller, which gives the same numbers to rounding, and
runs where there is no compiler, on other devices, and for other types. A library that does not
give known answers is not used.
"""

from __future__ import annotations

import ctypes
import logging
import math
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dpmoe_trainer.dp.ghost import ROUNDING
from dpmoe_trainer.dp.kernels.build import CannotBuild, find_or_build, is_slow_in_torch

_log = logging.getLogger(__name__)

_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}

_KNOWN_NORMS = [14035.0, 73500.0]
_KNOWN_NORMALS = {0: -0.6502757968488376, 64: -1.1570304482920815, 129: -0.17534739419143983}


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels are there and take these tensors together."""
    first = tensors[0].dtype
    return (
        first in _SUFFIX
        and all(tensor.device.type == "cpu" and tensor.dtype == first for tensor in tensors)
        and library() is not None
    )


def squared_norms(a_SI: Tensor, g_SO: Tensor, start_M: Tensor, length_M: Tensor) -> Tensor:
    """‖Σ_s g_s·a_sᵀ‖² of segments of rows, from the rows' inner products.

    Never below what rounding lets one know (`dp.ghost`).

    Args:
        a_SI: The rows' inputs.
        g_SO: Their gradients, of the same type.
        start_M: Each segment's first row.
        length_M: Each segment's number of rows, one or more.

    Returns:
        [M] float64.
    """
    a_SI, g_SO = a_SI.contiguous(), g_SO.contiguous()
    start_M, length_M = start_M.contiguous(), length_M.contiguous()
    norms_M = torch.empty(len(start_M), dtype=torch.float64)
    rounding = ROUNDING * torch.finfo(a_SI.dtype).eps
    _function("squared_norms", a_SI.dtype)(
        *(a_SI.data_ptr(), g_SO.data_ptr(), a_SI.shape[1], g_SO.shape[1]),
        *(start_M.data_ptr(), length_M.data_ptr(), len(start_M)),
        *(rounding, norms_M.data_ptr(), torch.get_num_threads()),
    )
    return norms_M


def squared_norms_of_samples(a_BTI: Tensor, g_BTO: Tensor) -> Tensor:
    """The same of samples of T rows each, [B] float64."""
    samples, rows = a_BTI.shape[:2]
    length_B = torch.full((samples,), rows)
    start_B = torch.arange(samples) * rows
    return squared_norms(a_BTI.flatten(0, 1), g_BTO.flatten(0, 1), start_B, length_B)


def multiplies(*matrices: Tensor) -> bool:
    """Whether the kernels are there, take these matrices, and are faster than torch's products."""
    return (
        all(each.dtype == torch.float32 for each in matrices)
        and torch.backends.mkl.is_available()
        and is_slow_in_torch()
        and usable(*matrices)
    )


def multiply(products: Sequence[Tensor], lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> None:
    """Writes left·right of each pair of matrices into their product.

    Args:
        products: [m, n] each, with contiguous rows, and no memory in common with the others.
        lefts: [m, k], in any order of memory.
        rights: [k, n], likewise.
    """
    _function("products", torch.float32)(*_table(products, lefts, rights), torch.get_num_threads())


def _table(
    products: Sequence[Tensor], lefts: Sequence[Tensor], rights: Sequence[Tensor]
) -> tuple[bytes, int]:
    """The kernel's table of products, and how many there are."""
    table = array("q")
    for product, left, right in zip(products, lefts, rights, strict=True):
        (rows, columns), depth = product.shape, left.shape[1]
        assert left.shape == (rows, depth), "left has the product's rows"
        assert right.shape == (depth, columns), "right has the product's columns"
        assert product.stride(1) == 1 or columns == 1, "a product's rows are contiguous"
        table.extend((left.data_ptr(), *left.stride(), right.data_ptr(), *right.stride()))
        table.extend((product.data_ptr(), product.stride(0), rows, columns, depth))
    return table.tobytes(), len(products)


def add_normal(numbers: Tensor, key: bytes, scale: float, first: int = 0) -> None:
    """Adds `scale` times the normal numbers of a key's stream, in place.

    Args:
        numbers: Contiguous.
        key: 32 bytes.
        scale: The standard deviation.
        first: Which of the stream's numbers is added to the first.
    """
    assert first >= 0, "a stream begins at 0"
    assert numbers.is_contiguous(), "the stream's order is that of memory"
    assert len(key) == 32, "a stream's key has 32 bytes"
    _function("add_normal", numbers.dtype)(
        numbers.data_ptr(), first, numbers.numel(), key, scale, torch.get_num_threads()
    )


@cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels; None, with a line in the log, where there are none."""
    try:
        loaded = ctypes.CDLL(str(find_or_build()))
    except (CannotBuild, OSError) as error:
        _log.warning("no compiled kernels, so torch's operations instead, more slowly: %s", error)
        return None
    pointer, count, real, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
    for suffix in _SUFFIX.values():
        norms = getattr(loaded, f"dpmoe_squared_norms_{suffix}")
        norms.argtypes = [pointer, pointer, count, count, pointer, pointer, count, real, pointer]
        norms.argtypes += [threads]
        normal = getattr(loaded, f"dpmoe_add_normal_{suffix}")
        normal.argtypes = [pointer, count, count, ctypes.c_char_p, real, threads]
        norms.restype = normal.restype = None
    loaded.dpmoe_products_f32.argtypes = [ctypes.c_char_p, count, threads]
    loaded.dpmoe_products_f32.restype = None
    if not _gives_known_answers(loaded):
        _log.warning("the compiled kernels miscalculate, so torch's operations instead")
        return None
    return loaded


def _function(name: str, dtype: torch.dtype) -> Callable[..., Any]:
    loaded = library()
    assert loaded is not None, "asked for only where usable"
    return getattr(loaded, f"dpmoe_{name}_{_SUFFIX[dtype]}")


def _gives_known_answers(loaded: ctypes.CDLL) -> bool:
    """Compares with a sum over whole numbers, and with numbers of a stream that torch computed."""
    rows, width = 7, 21
    a = torch.arange(rows * width).remainder(5).double().view(rows, width)
    g = torch.arange(rows * width).remainder(3).double().view(rows, width)
    start, length = torch.tensor([0, 2]), torch.tensor([2, 5])
    norms = torch.empty(2, dtype=torch.float64)
    loaded.dpmoe_squared_norms_f64(
        *(a.data_ptr(), g.data_ptr(), width, width, start.data_ptr(), length.data_ptr(), 2),
        *(0.0, norms.data_ptr(), 1),
    )
    normal, late = torch.zeros(130, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    loaded.dpmoe_add_normal_f64(normal.data_ptr(), 0, 130, bytes(range(32)), 1.0, 1)
    loaded.dpmoe_add_normal_f64(late.data_ptr(), 120, 10, bytes(range(32)), 1.0, 1)
    left, right = a.float(), g.float()
    product = torch.empty(width, width)
    loaded.dpmoe_products_f32(*_table([product], [left.T], [right]), 1)
    return (
        norms.tolist() == _KNOWN_NORMS
        and torch.equal(late, normal[120:])
        and all(
            math.isclose(float(normal[index]), known, rel_tol=1e-12)
            for index, known in _KNOWN_NORMALS.items()
        )
        and product.equal(left.T @ right)
    )
