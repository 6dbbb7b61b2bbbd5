"""One process, one thread, no sockets, no waiting: an event loop on which time is a number.

Whoever sleeps is woken at once, and the clock jumps; nothing happens between two steps of a test.
Everything that the operator or the server read from the machine (time, random names) comes from
here too, so that a world that is played twice is the same twice, and a crash point keeps its place.
"""

import asyncio
import itertools
import os
import random
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import Context, ContextVar, copy_context
from datetime import UTC, datetime, timedelta, tzinfo
from types import SimpleNamespace
from typing import Any, Self, TypeVar
from unittest.mock import patch

from dpmoe_operator.kube import apply, client, loop, transport, watch, workloads
from dpmoe_operator.local.apiserver import jobs, metadata, watching

T = TypeVar("T")

PROCESS: ContextVar[str] = ContextVar("process", default="cluster")
"""Which process a task belongs to; what a task starts belongs to the same one."""

START = datetime(2030, 1, 1, 12, 0, 0, tzinfo=UTC)


class SimulatedLoop(asyncio.BaseEventLoop):
    """An event loop without a selector: where nothing is ready, the next timer is due."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = SimpleNamespace(select=self._select)
        self._seconds = 0.0
        self._until_idle = False
        self._tasks: dict[str, list[asyncio.Task[Any]]] = {}
        self.set_exception_handler(_keep_quiet_about_the_dead)

    def time(self) -> float:
        """Seconds since the world began."""
        return self._seconds

    def run_until_idle(self) -> None:
        """Do everything that can be done without any time passing."""
        self._until_idle = True
        self.call_soon(lambda: None)
        try:
            self.run_forever()
        finally:
            self._until_idle = False

    def create_task(
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: object = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        """As always, and note whose task it is."""
        task = super().create_task(coro, name=name, context=context)
        owner = context.get(PROCESS, "cluster") if context is not None else PROCESS.get()
        self._tasks.setdefault(owner, []).append(task)
        return task

    def start_process(self, name: str, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine as the first task of a process."""
        context = copy_context()
        context.run(PROCESS.set, name)
        return self.create_task(coroutine, context=context)

    def end_process(self, name: str) -> None:
        """End all tasks of a process."""
        tasks = self._tasks.pop(name, [])
        for task in tasks:
            task.cancel()
        if tasks:
            self.run_until_complete(asyncio.wait(tasks))

    def run_in_executor(  # type: ignore[override]
        self, _executor: object, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """What would run in a thread runs here and now."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def _select(self, timeout: float | None) -> list[object]:
        if timeout == 0:
            return []
        if self._until_idle:
            self.stop()
        elif timeout is None:
            raise RuntimeError("everybody waits for somebody else, for ever")
        else:
            self._seconds += timeout
        return []

    def _process_events(self, _events: list[object]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody sleeps, so nobody must be woken."""


def _keep_quiet_about_the_dead(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    if not isinstance(error, Killed):
        raise RuntimeError(context.get("message")) from error


class Killed(BaseException):
    """The process of an operator ended here. No handler of the operator's may catch it."""


@contextmanager
def simulated_machine(world_loop: SimulatedLoop) -> Iterator[None]:
    """Give operator and server the world's clock, and names that repeat."""
    count = itertools.count(1)

    class Now(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            moment = START + timedelta(seconds=world_loop.time())
            return cls.fromtimestamp(moment.timestamp(), tz)

    clock = SimpleNamespace(monotonic=world_loop.time)
    with ExitStack() as stack:
        for module in (apply, loop, transport, workloads, jobs, metadata, watching):
            for name, replacement in (("datetime", Now), ("time", clock)):
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, replacement))
        # Nobody pulls the plug of the machine that runs the tests.
        stack.enter_context(patch.object(os, "fsync", lambda _file: None))
        for module in (client, watch):
            stack.enter_context(patch.object(module, "random", random.Random(0)))
        stack.enter_context(patch.object(metadata, "uuid4", lambda: f"{next(count):08d}-uid"))
        stack.enter_context(patch.object(metadata, "random_suffix", lambda: f"{next(count):05d}"))
        yield
