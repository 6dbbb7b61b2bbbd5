"""Runs the `dpmoe` command with a wall clock that is wrong: `skewed_clock.py SECONDS ARGUMENTS...`.

The monotonic clock stays as it is: it has no hour that could be wrong.
"""

import datetime
import sys
import time
from typing import Any

skew = float(sys.argv.pop(1))
true_time, true_datetime = time.time, datetime.datetime


class _AnyDatetime(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, true_datetime)


class SkewedDatetime(datetime.datetime, metaclass=_AnyDatetime):
    """A datetime whose now is another."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Any:
        return true_datetime.fromtimestamp(true_time() + skew, tz)

    @classmethod
    def utcnow(cls) -> Any:
        return true_datetime.fromtimestamp(true_time() + skew, datetime.UTC).replace(tzinfo=None)


# Before anything else takes these names into its own module.
time.time = lambda: true_time() + skew
datetime.datetime = SkewedDatetime  # type: ignore[misc]

from dpmoe_operator.cli.main import app  # noqa: E402

app()
