"""Ports for pods that all share one address."""

import socket
from dataclasses import dataclass, field

from dpmoe_operator.local.runner.sources import LOCAL_ADDRESS


@dataclass
class _Lease:
    port: int
    holders: set[str] = field(default_factory=set)


class Ports:
    """Hands out free ports and keeps each for as long as a pod holds it.

    A name stands for what shares a port: all pods that rendezvous at the same address get the same
    one, and a job that comes later under the same name gets a new one.
    """

    def __init__(self) -> None:
        self._leases: dict[str, _Lease] = {}

    def hold(self, name: str, holder: str) -> int:
        """The port of that name, now held by one more pod."""
        lease = self._leases.get(name)
        if lease is None:
            lease = self._leases[name] = _Lease(self._free_port())
        lease.holders.add(holder)
        return lease.port

    def release(self, holder: str) -> None:
        """Gives up all that a pod holds."""
        for name, lease in list(self._leases.items()):
            lease.holders.discard(holder)
            if not lease.holders:
                del self._leases[name]

    def _free_port(self) -> int:
        taken = {lease.port for lease in self._leases.values()}
        while True:
            with socket.socket() as probe:
                probe.bind((LOCAL_ADDRESS, 0))
                port = int(probe.getsockname()[1])
            if port not in taken:
                return port
