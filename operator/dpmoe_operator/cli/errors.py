"""How commands fail: one line that says what, where and what to do; no traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

FAILURE = 1
USAGE = 2


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors that a user can mend into one line on stderr and exit code 1."""
    try:
        yield
    except typer.Exit:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        Console(stderr=True, soft_wrap=True).print(f"dpmoe: {error}", markup=False, highlight=False)
        raise typer.Exit(FAILURE) from error
