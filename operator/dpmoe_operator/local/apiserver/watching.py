"""Watches: a resource's events as lines of JSON, from a revision on, for as long as asked."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from . import errors
from .cluster import Cluster
from .errors import ApiError
from .requests import Form
from .resources import Object, Resource
from .selectors import Selection
from .store import Cursor, Event, Stored, encode
from .tables import table

# So many events at most go into one write, and so into one look at the log.
BATCH = 500
BOOKMARK_SECONDS = 30.0
DEFAULT_SECONDS = 1800
INITIAL_EVENTS_END = "k8s.io/initial-events-end"


@dataclass(frozen=True)
class WatchRequest:
    """What a client wants to see.

    Attributes:
        since: revision after which events are wanted; None or 0 starts with what exists.
        initial_events: a bookmark must tell the end of what exists (WatchList).
        bookmarks: the client understands bookmarks.
        seconds: when the watch ends by itself.
    """

    resource: Resource
    selection: Selection
    form: Form
    include: str
    since: int | None
    initial_events: bool
    bookmarks: bool
    seconds: int


async def watch(cluster: Cluster, request: WatchRequest) -> AsyncIterator[bytes]:
    """The lines of a watch, several at once where several are due."""
    write = _Lines(request)
    since = request.since
    try:
        if since is not None and since > cluster.store.revision:
            # A revision of the future was seen on a server that is gone, with all its objects.
            raise errors.expired(f"resource version {since} is not of this server's run")
        if not since or request.initial_events:
            since = cluster.store.revision
            lines = [write.line("ADDED", each) for each in _existing(cluster, request)]
            if request.initial_events:
                lines.append(write.bookmark(since, initial_end=True))
            yield b"".join(lines)
        with cluster.store.watch(request.resource.storage, since) as cursor:
            async for chunk in _follow(cluster, request, cursor, write):
                yield chunk
    except ApiError as error:
        yield encode({"type": "ERROR", "object": error.status()}) + b"\n"


def _existing(cluster: Cluster, request: WatchRequest) -> list[Stored]:
    return list(cluster.select(request.resource, request.selection))


async def _follow(
    cluster: Cluster, request: WatchRequest, cursor: Cursor, write: "_Lines"
) -> AsyncIterator[bytes]:
    deadline = time.monotonic() + request.seconds
    while True:
        events = cursor.take(BATCH)
        if events:
            lines = b"".join(write.event(each) for each in events)
            if lines:
                yield lines
            continue
        if cursor.closed:
            return
        left = deadline - time.monotonic()
        # Nothing is pending here, so a bookmark may say that all events so far have been sent.
        if left <= 0:
            if request.bookmarks:
                yield write.bookmark(cluster.store.revision)
            return
        woken = await cursor.wait(min(left, BOOKMARK_SECONDS))
        if not woken and request.bookmarks and time.monotonic() < deadline:
            yield write.bookmark(cluster.store.revision)


class _Lines:
    """Writes events in the form that the client asked for."""

    def __init__(self, request: WatchRequest) -> None:
        self._request = request
        self._resource = request.resource

    def event(self, event: Event) -> bytes:
        """The line of one change, as seen through the selection; empty if it is not seen."""
        matches = self._request.selection.matches
        before = event.previous is not None and matches(event.previous.object)
        after = event.type != "DELETED" and matches(event.current.object)
        if after:
            return self.line("MODIFIED" if before else "ADDED", event.current)
        if not before or event.previous is None:
            return b""
        if event.type == "DELETED":
            return self.line("DELETED", event.current)
        # It left the selection: its state of before, at the revision of the change.
        old = event.previous.object
        metadata = {**old["metadata"], "resourceVersion": str(event.revision)}
        return self.line("DELETED", Stored({**old, "metadata": metadata}, event.revision))

    def line(self, kind: str, stored: Stored) -> bytes:
        """One event."""
        return b'{"type":"%s","object":%s}\n' % (kind.encode(), self._shown(stored))

    def bookmark(self, revision: int, *, initial_end: bool = False) -> bytes:
        """A mark that everything up to a revision has been sent."""
        metadata: Object = {"resourceVersion": str(revision), "creationTimestamp": None}
        if initial_end:
            metadata["annotations"] = {INITIAL_EVENTS_END: "true"}
        mark: Object = {
            "kind": self._resource.kind,
            "apiVersion": self._resource.api_version,
            "metadata": metadata,
        }
        if self._request.form is Form.TABLE:
            mark = table(self._resource, [], metadata)
        return encode({"type": "BOOKMARK", "object": mark}) + b"\n"

    def _shown(self, stored: Stored) -> bytes:
        if self._request.form is Form.OBJECT and self._resource.is_native(stored.object):
            return stored.raw
        served = self._resource.to_served(stored.object)
        if self._request.form is Form.TABLE:
            metadata = {"resourceVersion": str(stored.revision)}
            return encode(table(self._resource, [served], metadata, self._request.include))
        return encode(served)
