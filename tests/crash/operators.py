"""One operator process: the real objects, put together as the real start puts them together."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
from tests.builders import SETTINGS, Object
from tests.crash.server import Call
from tests.crash.wire import ANCHOR, Fault, Wire

from dpmoe_operator.kube.errors import ApiError
from dpmoe_operator.kube.lease import Leadership
from dpmoe_operator.kube.loop import RoundLoop
from dpmoe_operator.kube.picture import Listed, Picture
from dpmoe_operator.kube.resources import DPMOE_JOBS, PRIVATE_BLOCKS, Resource
from dpmoe_operator.kube.store import KubeEntryStore
from dpmoe_operator.kube.workloads import WorkloadWatch
from dpmoe_operator.ledger.anchor import Anchor, AnchorError
from dpmoe_operator.ledger.log import Ledger

if TYPE_CHECKING:
    from tests.crash.world import World

ROUND_SECONDS = 1.0
PATIENCE_SECONDS = 40.0
"""How long a turn may take: longer than the operator waits for a list, or while it is frozen."""


class SteppedLoop(RoundLoop):
    """The round loop, which waits before each round until it is told to."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.waiting = asyncio.Event()
        self.go = asyncio.Event()
        self.ended = asyncio.Event()

    async def round(self) -> bool:
        self.waiting.set()
        await self.go.wait()
        self.waiting.clear()
        self.go.clear()
        try:
            return await super().round()
        finally:
            self.ended.set()


class _Leader(Leadership):
    """The Lease has tests of its own: here everybody believes to lead, which is the worst case.

    So it is after the sleep of a whole machine, in which no clock went on.
    """

    @property
    def held(self) -> bool:
        return True


class _WiredAnchor(Anchor):
    """The anchor, as the process reaches it: every append may be the last thing that it does."""

    def __init__(self, folder: Path, wire: Wire) -> None:
        super().__init__(folder)
        self._wire = wire

    def append(self, manifests: Sequence[Mapping[str, Any]]) -> None:
        fault = self._wire.count(Call(ANCHOR, "append"))
        if fault is Fault.KILL_LATE:
            self._tear(manifests)
        if fault in (Fault.KILL_BEFORE, Fault.KILL_LATE):
            self._wire.die()
        if fault is not None and not fault.kills:
            raise AnchorError("AnchorUnusable", "the volume is full")
        super().append(manifests)
        if fault is Fault.KILL_AFTER:
            self._wire.die()

    def _tear(self, manifests: Sequence[Mapping[str, Any]]) -> None:
        """Write less than a line, as a process does that is cut off from the power."""
        last = max(self.folder.glob("log-*.jsonl"))
        with last.open("a") as file:
            file.write(json.dumps(manifests[0])[:100])


class Operator:
    """A process, from its start to its death.

    Attributes:
        wire: its calls.
        picture: what it believes.
    """

    def __init__(self, world: "World", name: str, faults: Mapping[int, Fault] | None) -> None:
        self.name = name
        self.wire = Wire(world.server, faults)
        self.picture = Picture()
        self._world = world
        self._client = self.wire.open()
        self._loop = SteppedLoop(
            client=self._client,
            picture=self.picture,
            ledger=Ledger(
                KubeEntryStore(self._client, SETTINGS.namespace),
                namespace=SETTINGS.namespace,
                writer=name,
                anchor=_WiredAnchor(world.anchor, self.wire),
            ),
            leadership=_Leader(
                self._client, namespace=SETTINGS.namespace, name="lease", identity=name
            ),
            resync=self._resync,
            watch=WorkloadWatch(self._client, self.picture),
            settings=SETTINGS,
            identity=name,
            round_seconds=ROUND_SECONDS,
        )
        self._main = world.loop.start_process(name, self._life())
        world.run(self._until(self._loop.waiting))
        self._bury()

    @property
    def alive(self) -> bool:
        """Whether the process runs; one that stands still does."""
        return not self.wire.dead

    @property
    def works(self) -> bool:
        """Whether it can do a round."""
        return self.alive and not self.wire.paused.is_set()

    @property
    def hears(self) -> bool:
        """Whether it follows the pods, and so will know the last word of one that goes."""
        return self.works and any(c.watches and c.path.endswith("/pods") for c in self.wire.calls)

    def turn(self) -> bool:
        """Let it do one round.

        Returns:
            Whether the round ended: it may also die, stand still, or refuse to go on.
        """
        if not self.works:
            return False
        self._loop.ended.clear()
        self._loop.go.set()
        self._world.run(self._until(self._loop.ended))
        self._loop.go.clear()
        self._world.settle()
        return self._loop.ended.is_set() and not self._bury()

    def resume(self) -> None:
        """Go on after a standstill, with what it believed before, and end that round."""
        self.wire.resume()
        self._world.run(self._until(self._loop.ended))
        self._bury()

    def kill(self) -> None:
        """End the process, wherever it is."""
        self.wire.kill()
        self._world.loop.end_process(self.name)

    async def _life(self) -> None:
        """As the operator starts: everything is listed, then rounds begin."""
        async with self._client:
            blocks, jobs = await self._list()
            feeds = (
                (PRIVATE_BLOCKS, blocks[1], self.picture.put_block, self.picture.drop_block),
                (DPMOE_JOBS, jobs[1], self.picture.put_job, self.picture.drop_job),
            )
            tasks = [asyncio.create_task(self._feed(*feed)) for feed in feeds]
            try:
                await self._loop.run()
            finally:
                for task in tasks:
                    task.cancel()

    async def _resync(self) -> None:
        await self._list()

    async def _list(self) -> tuple[Listed, Listed]:
        blocks, jobs = await self._client.list(PRIVATE_BLOCKS), await self._client.list(DPMOE_JOBS)
        self.picture.replace_all(blocks, jobs)
        return blocks, jobs

    async def _feed(
        self,
        resource: Resource,
        version: str,
        put: Callable[[Object], None],
        drop: Callable[[str], None],
    ) -> None:
        """As kopf does for the operator: bring the events of a kind. Its calls are its own."""
        while True:
            query = {"watch": "true", "resourceVersion": version, "timeoutSeconds": "100000"}
            try:
                async for line in self.wire.lines(
                    Call("GET", resource.path(None), query, b"", "application/json")
                ):
                    event = json.loads(line)
                    version = event["object"]["metadata"]["resourceVersion"]
                    if event["type"] == "DELETED":
                        drop(event["object"]["metadata"]["uid"])
                    elif event["type"] != "BOOKMARK":
                        put(event["object"])
            except aiohttp.ClientError:
                await asyncio.sleep(0.1)

    async def _until(self, reached: asyncio.Event) -> None:
        """Wait until it is there, dead, or stands still."""
        events = (reached, self.wire.died, self.wire.paused)
        waits = [asyncio.create_task(event.wait()) for event in events]
        await asyncio.wait(
            [*waits, self._main],
            timeout=PATIENCE_SECONDS,
            return_when=asyncio.FIRST_COMPLETED,
        )
        for wait in waits:
            wait.cancel()
        await asyncio.wait(waits)

    def _bury(self) -> bool:
        """Whether the process is dead; what it died of must be the test's doing."""
        if self._main.done() and not self.wire.dead:
            error = self._main.exception()
            # Without the API server it cannot start: its pod would be started again.
            if not isinstance(error, ApiError):
                raise AssertionError(f"{self.name} ended by itself") from error
            self.wire.kill()
        if self.wire.dead:
            self.kill()
        return self.wire.dead
