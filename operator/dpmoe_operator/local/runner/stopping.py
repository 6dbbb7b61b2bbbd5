"""When a pod has to stop, and how long it may take."""

import asyncio
from collections.abc import Coroutine
from typing import Any


class Stop:
    """A request to stop that may become more urgent, and never less.

    Attributes:
        asked: set once the pod has to stop.
        expired: set once it has had its time.
        reason: why, by the first who asked; empty for an ordinary deletion.
        message: the same for people.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.expired = asyncio.Event()
        self.reason = ""
        self.message = ""
        self._deadline = float("inf")
        self._timer: asyncio.TimerHandle | None = None

    def ask(self, grace_seconds: float, reason: str = "", message: str = "") -> None:
        """Asks to stop within so many seconds from now."""
        loop = asyncio.get_running_loop()
        if not self.asked.is_set():
            self.reason, self.message = reason, message
        self.asked.set()
        deadline = loop.time() + grace_seconds
        if deadline < self._deadline:
            self.cancel()
            self._deadline = deadline
            self._timer = loop.call_at(deadline, self.expired.set)

    def cancel(self) -> None:
        """Forgets the timer, for when nothing is left to stop."""
        if self._timer is not None:
            self._timer.cancel()


async def first(*waits: Coroutine[Any, Any, Any]) -> None:
    """Waits until one of several is done, and gives up on the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
