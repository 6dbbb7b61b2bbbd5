"""The ledger's entries as LedgerEntry objects of the API server."""

from collections.abc import Mapping
from typing import Any

from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.errors import AlreadyExists, NotFound, OutcomeUnknown, Unreachable
from dpmoe_operator.kube.resources import LEDGER_ENTRIES
from dpmoe_operator.ledger.log import EntryExists, NoAnswer


class KubeEntryStore:
    """Entries in one namespace. An `EntryStore` of `dpmoe_operator.ledger.log`."""

    def __init__(self, client: KubeClient, namespace: str) -> None:
        self._client, self._namespace = client, namespace

    async def entries(self) -> list[dict[str, Any]]:
        """All entries, by name, from one state of the server's storage."""
        items, _ = await self._client.list(LEDGER_ENTRIES, self._namespace)
        return sorted(items, key=lambda item: str(item["metadata"]["name"]))

    async def entry(self, name: str) -> dict[str, Any] | None:
        """One entry, or None where it is surely not there."""
        try:
            return await self._client.get(LEDGER_ENTRIES, self._namespace, name)
        except NotFound:
            return None
        except Unreachable as error:
            raise NoAnswer(str(error)) from error

    async def create(self, manifest: Mapping[str, Any]) -> None:
        """Add an entry; its name decides who was first."""
        try:
            await self._client.create(LEDGER_ENTRIES, self._namespace, dict(manifest))
        except AlreadyExists as error:
            raise EntryExists(str(error)) from error
        except OutcomeUnknown as error:
            raise NoAnswer(str(error)) from error

    async def remove(self, name: str) -> None:
        """Remove an entry that is in the archive; it may be gone already."""
        try:
            await self._client.delete(LEDGER_ENTRIES, self._namespace, name)
        except NotFound:
            return
