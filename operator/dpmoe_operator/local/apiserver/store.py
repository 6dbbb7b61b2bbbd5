"""The state: objects by resource, one counter of revisions, and a log of events per resource.

Stored objects are never changed in place. Whoever writes brings a new object, so readers may keep
and share what they got, and the JSON text of a version is made at most once. Watches read the log
through cursors; a write costs the number of waiting watchers, never the number of objects.
"""

import asyncio
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import errors
from .resources import Object, StorageKey

# How many events of one resource are kept at least; the log is cut when it is twice as long.
HISTORY = 10_000
# What etcd takes by default. Larger objects are refused here too, or a user would learn it late.
LARGEST_OBJECT = 1536 * 1024


class Stored:
    """One version of one object, and its JSON text."""

    __slots__ = ("_raw", "object", "revision")

    def __init__(self, obj: Object, revision: int) -> None:
        self.object = obj
        self.revision = revision
        self._raw: bytes | None = None

    @property
    def raw(self) -> bytes:
        """The object as JSON."""
        if self._raw is None:
            self._raw = encode(self.object)
        return self._raw


@dataclass(frozen=True, slots=True)
class Event:
    """One change: ADDED has no previous version, DELETED carries the last one."""

    type: str
    revision: int
    current: Stored
    previous: Stored | None


class Collection:
    """All objects of one resource, and their recent events.

    Attributes:
        floor: the history up to and including this revision is not kept.
        closed: no event will follow, since the resource or the server goes away.
    """

    def __init__(self, floor: int) -> None:
        self.floor = floor
        self.closed = False
        self.objects: dict[str, dict[str, Stored]] = {}
        self.events: list[Event] = []
        self.dropped = 0
        self.waiting: set[asyncio.Event] = set()

    def append(self, event: Event) -> None:
        """Logs an event and wakes the watchers."""
        self.events.append(event)
        if len(self.events) >= 2 * HISTORY:
            self.floor = self.events[HISTORY - 1].revision
            del self.events[:HISTORY]
            self.dropped += HISTORY
        self.wake()

    def close(self) -> None:
        """Ends all watches."""
        self.closed = True
        self.wake()

    def wake(self) -> None:
        """Lets every waiting reader look again."""
        for waiter in self.waiting:
            waiter.set()


class Cursor:
    """A reader's place in the log of one collection. Use it as a context manager."""

    def __init__(self, collection: Collection, since: int) -> None:
        self._collection = collection
        self._next = collection.dropped + bisect_right(
            collection.events, since, key=lambda event: event.revision
        )
        self._wakeup = asyncio.Event()

    def __enter__(self) -> "Cursor":
        self._collection.waiting.add(self._wakeup)
        return self

    def __exit__(self, *_: object) -> None:
        self._collection.waiting.discard(self._wakeup)

    @property
    def closed(self) -> bool:
        """Whether the log has ended."""
        return self._collection.closed

    def take(self, limit: int) -> list[Event]:
        """The next events, at most `limit`.

        Raises:
            ApiError: 410, if the reader fell so far behind that events were cut off.
        """
        start = self._next - self._collection.dropped
        if start < 0:
            raise errors.expired("The watch fell behind the events that are kept")
        events = self._collection.events[start : start + limit]
        self._next += len(events)
        return events

    async def wait(self, seconds: float) -> bool:
        """Waits for more events; returns whether there may be some."""
        try:
            async with asyncio.timeout(seconds):
                await self._wakeup.wait()
        except TimeoutError:
            return False
        self._wakeup.clear()
        return True


class Store:
    """Every object of the cluster.

    Attributes:
        revision: of the latest write; every write takes the next one.
        listeners: called synchronously after each write.
    """

    def __init__(self) -> None:
        self.revision = 0
        self.listeners: list[Callable[[StorageKey, Event], None]] = []
        self._collections: dict[StorageKey, Collection] = {}

    def get(self, key: StorageKey, namespace: str, name: str) -> Stored | None:
        """One object, or None."""
        return self._collection(key).objects.get(namespace, {}).get(name)

    def scan(self, key: StorageKey, namespace: str | None = None) -> Iterator[Stored]:
        """The objects of one namespace, or of all, ordered by namespace and name."""
        objects = self._collection(key).objects
        for space in sorted(objects) if namespace is None else [namespace]:
            members = objects.get(space, {})
            for name in sorted(members):
                yield members[name]

    def is_empty(self, key: StorageKey, namespace: str | None = None) -> bool:
        """Whether there is no object, in one namespace or at all."""
        objects = self._collection(key).objects
        return not any(objects.values()) if namespace is None else not objects.get(namespace)

    def put(self, key: StorageKey, obj: Object) -> Stored:
        """Creates or replaces an object and gives it the next resourceVersion.

        Raises:
            ApiError: 500, as kube-apiserver does, for an object that etcd would not take.
        """
        collection, metadata = self._collection(key), obj["metadata"]
        members = collection.objects.setdefault(metadata.get("namespace", ""), {})
        previous = members.get(metadata["name"])
        stored = self._stamped(obj)
        if len(stored.raw) > LARGEST_OBJECT:
            raise errors.ApiError(500, "", "etcdserver: request is too large")
        members[metadata["name"]] = stored
        kind = "ADDED" if previous is None else "MODIFIED"
        self._publish(key, Event(kind, stored.revision, stored, previous))
        return stored

    def remove(self, key: StorageKey, obj: Object) -> Stored:
        """Removes an object; `obj` is its last state, which the event shows."""
        metadata = obj["metadata"]
        members = self._collection(key).objects[metadata.get("namespace", "")]
        previous = members.pop(metadata["name"])
        if not members:
            del self._collection(key).objects[metadata.get("namespace", "")]
        last = self._stamped(obj)
        self._publish(key, Event("DELETED", last.revision, last, previous))
        return last

    def watch(self, key: StorageKey, since: int) -> Cursor:
        """A cursor to the events after a revision.

        Raises:
            ApiError: 410, if the events since then are no longer kept.
        """
        collection = self._collection(key)
        if since < collection.floor:
            raise errors.expired(f"too old resource version: {since} ({collection.floor})")
        return Cursor(collection, since)

    def open(self, key: StorageKey) -> None:
        """Starts the history of a resource that is new from now on."""
        self._collections[key] = Collection(self.revision)

    def drop(self, key: StorageKey) -> None:
        """Forgets a resource with its history, and ends its watches."""
        self._collections.pop(key, Collection(0)).close()

    def close(self) -> None:
        """Ends all watches."""
        for collection in self._collections.values():
            collection.close()

    def _collection(self, key: StorageKey) -> Collection:
        return self._collections.setdefault(key, Collection(0))

    def _stamped(self, obj: Object) -> Stored:
        """The object as it will be at the next revision."""
        revision = self.revision + 1
        metadata = {**obj["metadata"], "resourceVersion": str(revision)}
        return Stored({**obj, "metadata": metadata}, revision)

    def _publish(self, key: StorageKey, event: Event) -> None:
        self.revision = event.revision
        self._collection(key).append(event)
        for listener in self.listeners:
            listener(key, event)


def encode(value: object) -> bytes:
    """JSON as the server writes it."""
    return json.dumps(value, separators=(",", ":")).encode()
