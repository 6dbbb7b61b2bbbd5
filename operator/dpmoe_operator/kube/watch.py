"""Keeps a picture of a collection that follows the API server, through everything that breaks.

A watch ends for many reasons: the server's own timeout, a dropped connection, a resource version
that was compacted away, a connection that is dead without saying so. What holds:

- Whoever listens sees every object appear, change and vanish in an order that makes sense, even
  over a gap: after a new list the differences come as events like any others. Events that
  happened inside a gap are folded into one.
- A DELETED event carries the object as it last was. From a watch this is the final object; after
  a gap it is the last one seen, and its final status may have been missed.
- A picture is only carried on where the server's history surely goes on. In doubt, and when the
  server's resource versions run backwards as after a restored backup, it lists again.
- `last_contact` grows only when the server was heard, so that its age tells a live picture from a
  frozen one.
- An error of the listener is not swallowed: `run` ends with it.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from contextlib import aclosing

from dpmoe_operator.kube.client import KubeClient, Object
from dpmoe_operator.kube.errors import ApiError, Gone, Unreachable
from dpmoe_operator.kube.resources import Resource

logger = logging.getLogger(__name__)

Key = tuple[str, str]
"""Namespace and name; the namespace is empty for kinds that have none."""

OnEvent = Callable[[str, Object], None]
"""Takes ADDED, MODIFIED or DELETED and the object."""

OnTold = Callable[[str, bool], None]
"""Takes the resource version up to which everything was told, and whether by a list: what came and
went since the version before was not, then."""

_BACKOFF_BASE_SECONDS = 0.5
_BACKOFF_MAX_SECONDS = 30.0


class Informer:
    """Lists a collection, then watches it, until `run` is cancelled.

    Attributes:
        objects: the collection as last seen. Read it, and leave it as it is.
        synced: set once the first list has been handed over.
        last_contact: the clock's reading when the server was last heard; minus infinity before.
    """

    def __init__(
        self,
        client: KubeClient,
        resource: Resource,
        namespace: str | None = None,
        label_selector: str | None = None,
        on_event: OnEvent = lambda _type, _object: None,
        *,
        on_told: OnTold = lambda _version, _listed: None,
        silence_seconds: float = 90.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts nothing yet.

        Args:
            client: an open client.
            resource: the kind of object.
            namespace: `None` for all namespaces.
            label_selector: only objects with these labels; one that loses them counts as deleted.
            on_event: called for each change, in the event loop: be quick.
            on_told: called after all changes that a list brings, after each other change, and at
                each bookmark.
            silence_seconds: how long a watch may bring nothing, not even a bookmark.
            clock: what `last_contact` is read from.
        """
        self.client = client
        self.resource = resource
        self.namespace = namespace
        self.label_selector = label_selector
        self.on_event = on_event
        self.on_told = on_told
        self.objects: dict[Key, Object] = {}
        self.synced = asyncio.Event()
        self.last_contact = -float("inf")
        self._silence_seconds = silence_seconds
        self._clock = clock
        self._failures = 0

    async def run(self) -> None:
        """Follows the collection for ever; ends only by cancellation or an error of `on_event`."""
        version: str | None = None
        while True:
            try:
                if version is None:
                    version = await self._relist()
                version = await self._follow(version)
            except ApiError as error:
                logger.warning("can't follow %s: %s", self.resource, error)
                version = None
                await self._back_off()

    async def _relist(self) -> str:
        """Reads the whole collection and tells what differs from the last picture."""
        items, version = await self.client.list(self.resource, self.namespace, self.label_selector)
        self._heard()
        current = {_key(item): item for item in items}
        for key in [key for key in self.objects if key not in current]:
            self._apply("DELETED", self.objects[key])
        for item in items:
            self._apply("MODIFIED", item)
        self.on_told(version, True)
        self.synced.set()
        return version

    async def _follow(self, version: str) -> str | None:
        """Hands over events until the watch ends.

        Returns:
            The resource version to go on from; `None` where only a new list can be trusted.

        Raises:
            ApiError: the server refuses the watch.
        """
        events = self.client.watch(
            self.resource,
            self.namespace,
            self.label_selector,
            resource_version=version,
            timeout_seconds=random.randint(240, 360),
            silence_seconds=self._silence_seconds,
        )
        count = 0
        try:
            async with aclosing(events):
                async for type_, obj in events:
                    self._heard()
                    count += 1
                    if type_ != "BOOKMARK":
                        self._apply(type_, obj)
                    elif _is_older(obj["metadata"]["resourceVersion"], version):
                        logger.warning("%s: the server's history was rewound", self.resource)
                        return None
                    version = obj["metadata"]["resourceVersion"]
                    self.on_told(version, False)
            self._heard()
        except Gone:
            logger.info("%s: the watch is too old to go on", self.resource)
            await self._back_off()
            return None
        except Unreachable as error:
            logger.info("%s: the watch broke: %s", self.resource, error)
            await self._back_off()
            # A server that answered with an error may have another history by now.
            if error.status != 0:
                return None
        if count == 0:
            # Nothing at all is what a watch from the future brings, after a restored backup.
            await self._back_off()
            return None
        return version

    def _apply(self, type_: str, obj: Object) -> None:
        """Brings the picture up to date and tells the listener what that meant."""
        key = _key(obj)
        known = self.objects.get(key)
        if type_ == "DELETED":
            self.objects.pop(key, None)
            if known is not None:
                self.on_event("DELETED", obj)
            return
        if known is not None and known["metadata"].get("uid") != obj["metadata"].get("uid"):
            del self.objects[key]
            self.on_event("DELETED", known)
            known = None
        self.objects[key] = obj
        if known is None:
            self.on_event("ADDED", obj)
        elif known["metadata"]["resourceVersion"] != obj["metadata"]["resourceVersion"]:
            self.on_event("MODIFIED", obj)

    def _heard(self) -> None:
        self.last_contact = self._clock()
        self._failures = 0

    async def _back_off(self) -> None:
        self._failures += 1
        ceiling = min(_BACKOFF_MAX_SECONDS, _BACKOFF_BASE_SECONDS * 2**self._failures)
        await asyncio.sleep(random.uniform(ceiling / 2, ceiling))


def _key(obj: Object) -> Key:
    metadata = obj["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


def _is_older(version: str, than: str) -> bool:
    return version.isdigit() and than.isdigit() and int(version) < int(than)
