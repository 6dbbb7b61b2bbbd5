"""The loop every controller runs: keys of objects to look at, each at most once at a time.

Level-triggered: a key says that something about an object may have changed, not what. A key
whose work failed comes back after a while, so that no error ends the controller.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Hashable
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)

RETRY_SECONDS = 1.0


class WorkQueue(Generic[Key]):
    """Keys that wait for `work`, in order, without duplicates."""

    def __init__(self, work: Callable[[Key], None]) -> None:
        self._work = work
        self._waiting: dict[Key, None] = {}
        self._wakeup = asyncio.Event()
        self._timers: dict[Key, asyncio.TimerHandle] = {}

    def add(self, key: Key) -> None:
        """Looks at `key` soon."""
        self._waiting[key] = None
        self._wakeup.set()

    def add_after(self, key: Key, seconds: float) -> None:
        """Looks at `key` after a delay; a later call replaces an earlier one."""
        if key in self._timers:
            self._timers.pop(key).cancel()
        self._timers[key] = asyncio.get_running_loop().call_later(seconds, self._due, key)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Works while the context lasts."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            for timer in self._timers.values():
                timer.cancel()

    def _due(self, key: Key) -> None:
        del self._timers[key]
        self.add(key)

    async def _run(self) -> None:
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            while self._waiting:
                key = next(iter(self._waiting))
                del self._waiting[key]
                self._attempt(key)
                # Requests are served between two pieces of work.
                await asyncio.sleep(0)

    def _attempt(self, key: Key) -> None:
        try:
            self._work(key)
        except Exception:
            logger.exception("Will retry %s in %.0f s", key, RETRY_SECONDS)
            self.add_after(key, RETRY_SECONDS)
