"""A cluster with people, nodes and operators, in one process.

The API server with its controllers is the embedded one, and the operator is the real one, from its
round loop down to its HTTP transport. What is played is only what neither of them is: people, the
nodes, the network between operator and server, and time.
"""

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, TypeVar
from unittest.mock import patch

import yaml
from tests.builders import OTHER_TEAM, OWNER, SETTINGS, TEAM, Object
from tests.crash.nodes import Nodes
from tests.crash.operators import Operator
from tests.crash.server import InProcessServer
from tests.crash.simulated import SimulatedLoop, simulated_machine
from tests.crash.truth import GROUP, Truth
from tests.crash.wire import Fault, Wire

from dpmoe_operator.kube.store import KubeEntryStore
from dpmoe_operator.launch.launching import JOB_UID
from dpmoe_operator.ledger import log
from dpmoe_operator.ledger.anchor import Anchor
from dpmoe_operator.ledger.fold import LedgerState
from dpmoe_operator.ledger.recovery import recover
from dpmoe_operator.local.apiserver.deletion import Deletion
from dpmoe_operator.local.apiserver.resources import (
    CRDS,
    JOBS,
    NAMESPACES,
    PODS,
    Resource,
    StorageKey,
)
from dpmoe_operator.local.apiserver.store import Event

T = TypeVar("T")

CRD_FOLDER = Path(__file__).parents[2] / "crds"
PLURALS = {"PrivateBlock": "privateblocks", "DPMoEJob": "dpmoejobs"}
OWNED = (("", "configmaps"), ("", "services"), ("networking.k8s.io", "networkpolicies"))
"""What a Job of ours owns beside its pods."""

LOGGER = logging.getLogger("dpmoe_operator")


@cache
def _definitions() -> list[Object]:
    return [yaml.safe_load(path.read_text()) for path in sorted(CRD_FOLDER.glob("*.yaml"))]


class World:
    """Everything that is there. Use it as a context manager.

    Attributes:
        server: the API server.
        nodes: what runs pods.
        anchor: the folder of the anchor, which all operators share.
        operators: the processes that were started, dead ones too.
        truth: the log as it ever was, and the rules.
        unheard: uids of jobs of which a pod went, with what it had to say, and the operator that
            heard it died before it settled, or none was there to hear it.
        complaints: what server and operators logged as an error.
    """

    def __init__(self, checkpoint_entries: int = log.CHECKPOINT_ENTRIES) -> None:
        """Build it; no operator runs yet.

        Args:
            checkpoint_entries: after how many entries a checkpoint is due.
        """
        self.loop = SimulatedLoop()
        self.server = InProcessServer()
        self.cluster = self.server.cluster
        self.operators: list[Operator] = []
        self.unheard: set[str] = set()
        self.complaints = _Complaints()
        self._stack = ExitStack()
        self._stack.enter_context(simulated_machine(self.loop))
        self._stack.enter_context(self.complaints)
        self._stack.enter_context(patch.object(log, "CHECKPOINT_ENTRIES", checkpoint_entries))
        self.anchor = Path(self._stack.enter_context(TemporaryDirectory()))
        self.nodes = Nodes(self.cluster, lambda uid: self.truth.check_start(uid))
        self.truth = Truth(self.cluster, self.nodes, self.anchor)
        self._gone: set[str] = set()
        self.run(self.server.__aenter__())
        for name in (OWNER, TEAM, OTHER_TEAM, SETTINGS.namespace):
            self.cluster.create(NAMESPACES, "", {"metadata": {"name": name}})
        for definition in _definitions():
            self.cluster.create(CRDS, "", definition)
        self.cluster.store.listeners.append(self._note)
        self.settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End everything."""
        for operator in self.operators:
            operator.kill()
        self.run(self.server.__aexit__(None, None, None))
        left = asyncio.all_tasks(self.loop)
        self.loop.close()
        self._stack.close()
        assert not left, f"still running: {left}"

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run until something is done, however long that takes."""
        return self.loop.run_until_complete(coroutine)

    def settle(self) -> None:
        """Let everybody do what they can do at once; no time passes."""
        self.loop.run_until_idle()

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.run(asyncio.sleep(seconds))
        self.settle()

    @property
    def activity(self) -> int:
        """Grows with every write, with every one that an operator tries, and with every step."""
        calls = (call for operator in self.operators for call in operator.wire.calls)
        tried, steps = sum(call.writes for call in calls), sum(self.nodes.steps.values())
        return self.cluster.store.revision + tried + steps

    @property
    def ledger(self) -> LedgerState:
        """The fold of all that ever committed."""
        return self.truth.ledger

    # Operators

    def start_operator(self, faults: Mapping[int, Fault] | None = None) -> Operator:
        """A new process: it knows nothing but what it reads."""
        open_grants = {uid for uid, grant in self.ledger.grants.items() if grant.settled is None}
        self.unheard |= self._gone & open_grants
        operator = Operator(self, f"operator-{len(self.operators)}", faults)
        self.operators.append(operator)
        return operator

    def arrive_late(self) -> None:
        """What dead operators had sent reaches the server now; nobody hears the answers."""
        for operator in self.operators:
            for call in operator.wire.in_flight:
                self.run(self.server.answer(call))
            operator.wire.in_flight.clear()
        self.settle()

    def _note(self, key: StorageKey, event: Event) -> None:
        if key == PODS.storage and event.type == "DELETED":
            uid = event.current.object["metadata"]["labels"][JOB_UID]
            self._gone.add(uid)
            if not self.operators[-1].hears:
                self.unheard.add(uid)

    # People

    def apply(self, manifest: Object) -> str:
        """Create a block or a job; its uid."""
        meta = {key: manifest["metadata"][key] for key in ("name", "namespace")}
        resource = self._resource(PLURALS[manifest["kind"]])
        created = self.cluster.create(resource, meta["namespace"], manifest | {"metadata": meta})
        uid: str = created["metadata"]["uid"]
        return uid

    def objects(self, plural: str) -> dict[str, Object]:
        """All blocks, or all jobs, by uid."""
        found = self.cluster.store.scan((GROUP, plural))
        return {stored.object["metadata"]["uid"]: stored.object for stored in found}

    def edit(self, plural: str, uid: str, **spec: Any) -> None:
        """Change some fields of a spec."""
        meta = self.objects(plural)[uid]["metadata"]
        self.cluster.modify(
            self._resource(plural),
            meta["namespace"],
            meta["name"],
            lambda old: {**old, "spec": {**old["spec"], **spec}},
        )

    def delete(self, plural: str, uid: str) -> None:
        """Delete a block or a job."""
        meta = self.objects(plural)[uid]["metadata"]
        self.cluster.delete(self._resource(plural), meta["namespace"], meta["name"])

    def _resource(self, plural: str) -> Resource:
        found = self.cluster.registry.find(GROUP, "v1alpha1", plural)
        assert found is not None
        return found

    # People with rights in the data namespace

    def workloads(self) -> list[Object]:
        """All Kubernetes Jobs, by name."""
        return [stored.object for stored in self.cluster.store.scan(JOBS.storage, OWNER)]

    def delete_workload(self, workload: Object, policy: str = "Background") -> None:
        """Delete a Kubernetes Job by hand."""
        self.cluster.delete(JOBS, OWNER, workload["metadata"]["name"], Deletion(policy))

    def suspend_workload(self, workload: Object) -> None:
        """Suspend a Kubernetes Job by hand."""
        self.cluster.modify(
            JOBS,
            OWNER,
            workload["metadata"]["name"],
            lambda old: {**old, "spec": {**old["spec"], "suspend": True}},
        )

    def delete_orphans(self) -> None:
        """Delete what a Job left that was deleted without what it owned, as statuses ask for."""
        for key in OWNED:
            for obj in [stored.object for stored in self.cluster.store.scan(key, OWNER)]:
                if not obj["metadata"].get("ownerReferences"):
                    resource = self.cluster.registry.of_storage(key)
                    self.cluster.delete(resource, OWNER, obj["metadata"]["name"])

    # People with rights over the log

    def take_back(self, count: int) -> None:
        """Restore an older copy of the log: its last entries are gone, but never the first one."""
        before = self.truth.entries()
        for manifest in before[max(1, len(before) - count) :]:
            name = manifest["metadata"]["name"]
            self.cluster.delete(self._resource("ledgerentries"), SETTINGS.namespace, name)
        self.truth.was_taken_back(before)

    def recover(self) -> None:
        """Put back what the anchor holds, as statuses ask for."""

        async def put_back() -> None:
            async with Wire(self.server).open() as client:
                store = KubeEntryStore(client, SETTINGS.namespace)
                await recover(store, Anchor(self.anchor), SETTINGS.namespace, self.truth.fork())

        self.run(put_back())


class _Complaints(logging.Handler):
    """Collects what is logged as an error; everything below is not even formatted."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []
        self._before = LOGGER.level, LOGGER.propagate

    def __enter__(self) -> Self:
        LOGGER.setLevel(logging.ERROR)
        LOGGER.propagate = False
        LOGGER.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        LOGGER.removeHandler(self)
        level, LOGGER.propagate = self._before
        LOGGER.setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
