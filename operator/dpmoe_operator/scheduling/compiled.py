"""Loops that must see one task after the other, compiled to machine code by numba.

A fill of 100,000 tasks takes a second in Python and a few hundredths compiled. Compilation happens
at the first call (half a second or so a function) and is cached beside the source, or where
NUMBA_CACHE_DIR says, as in the operator's container, whose root is read-only. Where nothing can be
written each process compiles once.

A function that is compiled here takes arrays and numbers only, always of the same types, calls no
other of ours, and releases the interpreter's lock.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function when it is first called, and so import numba only when it is needed."""

    @functools.cache
    def machine_code() -> Callable[P, R]:
        import numba

        try:
            return cast("Callable[P, R]", numba.njit(nogil=True, cache=True)(function))
        except RuntimeError:  # No folder to cache in can be written.
            return cast("Callable[P, R]", numba.njit(nogil=True)(function))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return machine_code()(*args, **kwargs)

    return call
