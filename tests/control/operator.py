"""A tiny operator around the real decisions: what one process knows and does.

`Operator` sees the cluster through a watch that may lag, commits to a ledger, applies actions one
by one, and may be killed between any two of them.
"""

from collections.abc import Callable
from copy import deepcopy
from datetime import timedelta

from tests.builders import OWNER, SETTINGS, Object, run
from tests.control.cluster import Cluster

from dpmoe_operator.control.actions import (
    Action,
    DeleteJob,
    MarkStarted,
    Pause,
    Prepare,
    Release,
    Remove,
    Stop,
)
from dpmoe_operator.control.decide import Decision, decide, react
from dpmoe_operator.control.planning import Planner
from dpmoe_operator.control.steering import pause_patch, release_patch, stop_patch
from dpmoe_operator.control.times import format_time
from dpmoe_operator.control.views import WorkloadView
from dpmoe_operator.kube.picture import Picture
from dpmoe_operator.launch.launching import JOB_UID
from dpmoe_operator.ledger.entry import in_entries
from dpmoe_operator.ledger.log import Ledger


class Killed(Exception):
    """The operator's process ended."""


class Operator:
    """One operator process.

    Attributes:
        fuse: how many more writes it does before it is killed; None lets it live.
        deaf: its watch of pods brings nothing.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.fuse: int | None = None
        self.deaf = False
        self.restart()

    def restart(self) -> None:
        """A new process: everything in memory is lost, everything is listed anew."""
        self.picture = Picture()
        self.planner = Planner(SETTINGS)
        self.ledger = Ledger(self.cluster.store, namespace="dpmoe-system", writer="operator")
        run(self.ledger.load())
        self.cluster.pending.clear()
        for manifest in self.cluster.blocks.values():
            self.picture.put_block(deepcopy(manifest))
        for manifest in self.cluster.jobs.values():
            self.picture.put_job(deepcopy(manifest))
        for manifest in self.cluster.workloads.values():
            self.picture.on_workload("ADDED", deepcopy(manifest))
        for manifest in self.cluster.pods.values():
            self.picture.on_pod("ADDED", deepcopy(manifest))
        self.picture.on_pods_told(OWNER, str(self.cluster.version), True)

    def list_pods(self) -> None:
        """The watch of pods breaks, with all that it had not brought yet, and a list follows."""
        pending, pods = self.cluster.pending, self.cluster.pods
        pending[:] = [event for event in pending if event[0] != "pod"]
        for uid, seen in list(self.picture._pod_objects.items()):
            if uid not in pods:
                self.picture.on_pod("DELETED", seen)
        for manifest in pods.values():
            self.picture.on_pod("MODIFIED", deepcopy(manifest))
        self.picture.on_pods_told(OWNER, str(self.cluster.version), True)

    def deliver(self, count: int | None = None) -> None:
        """Let the watches bring the oldest events."""
        self._deliver(count)
        if not any(kind == "pod" for kind, _, _ in self.cluster.pending):
            self.picture.on_pods_told(OWNER, str(self.cluster.version), False)

    def _deliver(self, count: int | None) -> None:
        events = self.cluster.pending[:count]
        late = [event for event in events if self.deaf and event[0] == "pod"]
        self.cluster.pending[: len(events)] = late
        for kind, event, manifest in events:
            uid = manifest["metadata"]["uid"]
            if kind == "workload":
                self.picture.on_workload(event, manifest)
            elif kind == "pod" and not self.deaf:
                self.picture.on_pod(event, manifest)
            elif kind == "pod":
                continue
            elif kind == "block":
                if event == "DELETED":
                    self.picture.drop_block(uid)
                else:
                    self.picture.put_block(manifest)
            elif event == "DELETED":
                self.picture.drop_job(uid)
            else:
                self.picture.put_job(manifest)

    def round(self) -> tuple[Decision, list[Action]]:
        """One round, as the loop does it. May raise `Killed`."""
        for workload in self.picture.unconfirmed(self.ledger.state):
            self._confirm(workload)
        snapshot = self.picture.snapshot(self.ledger.state, self.cluster.now)
        decision = decide(snapshot, SETTINGS, self.planner)
        for records in in_entries(decision.records):
            self._burn()
            time = self.cluster.now.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            run(self.ledger.append(records, time=time))
        actions = react(snapshot, decision, SETTINGS)
        for action in actions:
            self._burn()
            self._apply(action)
        return decision, actions

    def _burn(self) -> None:
        if self.fuse is not None:
            if self.fuse == 0:
                raise Killed
            self.fuse -= 1

    def _confirm(self, workload: WorkloadView) -> None:
        uid = workload.meta.labels[JOB_UID]
        pods = [
            deepcopy(each)
            for each in self.cluster.pods.values()
            if each["metadata"]["labels"][JOB_UID] == uid
        ]
        self.picture.confirm_pods(workload, pods, str(self.cluster.version))

    def _apply(self, action: Action) -> None:
        cluster = self.cluster
        if isinstance(action, Prepare):
            manifest = cluster.create_workload(action.launch)
            self.picture.prepared.add(action.launch.job.uid)
            self.picture.on_workload("MODIFIED", manifest)
        elif isinstance(action, Release | Pause | Stop):
            self._patch(action)
        elif isinstance(action, MarkStarted):
            self.picture.marked.add(action.job.uid)
        elif isinstance(action, Remove):
            if action.uid in cluster.workloads:
                for name in cluster.pods_of(action.uid):
                    cluster.terminate(name)
                cluster.kubelet()
                cluster.delete("workload", action.uid)
        elif isinstance(action, DeleteJob):
            cluster.delete("job", action.uid)
        else:
            stored = cluster.set_status(action)
            if stored is not None:
                put: Callable[[Object], None] = (
                    self.picture.put_job if action.plural == "dpmoejobs" else self.picture.put_block
                )
                put(stored)

    def _patch(self, action: Release | Pause | Stop) -> None:
        known = self.cluster.workload_of(action.job_uid)
        if known is None:
            return
        meta = known["metadata"]
        now = format_time(self.cluster.now)
        guarded = not isinstance(action, Stop) or action.watch is not None
        if guarded and meta["resourceVersion"] != action.resource_version:
            return
        if isinstance(action, Stop):
            patch = stop_patch(action, now)
        elif isinstance(action, Pause):
            patch = pause_patch(action, now)
        else:
            patch = release_patch(action, now)
        stored = self.cluster.patch_workload(meta["uid"], patch)
        self.picture.on_workload("MODIFIED", stored)
        if isinstance(action, Release | Stop):
            self.picture.on_watched(action.job_uid, stored, action.watch)


def settle_down(cluster: Cluster, operator: Operator, seconds: int = 1) -> None:
    """Let everything run to its end, until a whole round changes nothing.

    Args:
        cluster: the cluster.
        operator: its operator.
        seconds: time between two rounds.
    """
    for _ in range(40):
        operator.deliver()
        decision, actions = operator.round()
        cluster.job_controller()
        cluster.kubelet()
        for uid in list(cluster.pods):
            cluster.advance(uid)
            if cluster.is_running(uid):
                cluster.train(uid, 10**9)
                cluster.finish(uid)
        cluster.job_controller()
        cluster.now += timedelta(seconds=seconds)
        if not decision.records and not actions and not cluster.pending:
            return
    raise AssertionError(f"never quiet: {decision.records} {actions}")
