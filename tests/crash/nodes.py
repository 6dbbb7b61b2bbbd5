"""Nodes with a kubelet and trainers, played: they write pod statuses into the embedded server.

A container starts only once its node can mount the plan, as in a cluster, and what the trainer does
comes from that plan. At that moment the ledger must show that the run is granted and launched.
"""

from collections.abc import Callable
from typing import Any

from tests.builders import OWNER, Object
from tests.control.workloads import CREATING, NEVER_FOUND, RUNNING, SCHEDULED, ended, report

from dpmoe_operator.launch.launching import JOB_UID
from dpmoe_operator.launch.paths import PLAN_FILE
from dpmoe_operator.local.apiserver.cluster import Cluster
from dpmoe_operator.local.apiserver.deletion import Deletion
from dpmoe_operator.local.apiserver.resources import PODS
from dpmoe_trainer.contract import Outcome, TrainingPlan

GONE = Deletion("Background", grace_seconds=0)


class Nodes:
    """Runs the pods of all Jobs.

    Attributes:
        has_room: whether pods get a node.
        patience: steps after which a trainer waits to be stopped; None lets it end.
        steps: steps that trainers of a DPMoEJob really took, over all of its pods.
    """

    def __init__(self, cluster: Cluster, on_start: Callable[[str], None]) -> None:
        self.has_room = True
        self.patience: int | None = None
        self.steps: dict[str, int] = {}
        self._cluster, self._on_start = cluster, on_start
        self._taken: dict[str, int] = {}
        self._plans: dict[str, TrainingPlan] = {}

    def pods(self) -> list[Object]:
        """All pods, by name."""
        return [stored.object for stored in self._cluster.store.scan(PODS.storage, OWNER)]

    def tick(self) -> None:
        """The scheduler, then each kubelet does the next thing: start, train, end."""
        for pod in self.pods():
            if not pod["spec"].get("nodeName"):
                self.advance(pod)
        for pod in self.pods():
            if "deletionTimestamp" in pod["metadata"]:
                self.terminate(pod)
            elif not is_running(pod):
                self.advance(pod)
            elif self._left(pod) > 0:
                self.train(pod, self._left(pod))
            elif self.patience is None:
                self.finish(pod)

    def advance(self, pod: Object) -> None:
        """One step of a pod's way from its creation to a running trainer."""
        if not pod["spec"].get("nodeName"):
            if self.has_room:
                self._change(pod, spec=pod["spec"] | {"nodeName": "node-1"})
                self._set_status(pod, SCHEDULED)
        elif pod["status"] == SCHEDULED:
            self._set_status(pod, CREATING)
        elif pod["status"] == CREATING:
            self._start(pod)

    def train(self, pod: Object, steps: int) -> None:
        """Let a running trainer take steps, never more than its plan has."""
        uid = pod["metadata"]["uid"]
        more = min(steps, self._left(pod))
        self._taken[uid] += more
        self.steps[_job(pod)] = self.steps.get(_job(pod), 0) + more

    def finish(self, pod: Object, *, crash: bool = False) -> None:
        """End a running trainer: with its report, or killed without one."""
        plan, taken = self._plans[_job(pod)], self._taken[pod["metadata"]["uid"]]
        if crash:
            self._set_status(pod, ended(137))
            return
        done = taken == plan.privacy.steps
        message = report(
            plan.digest(),
            job_uid=_job(pod),
            outcome=Outcome.COMPLETED if done else Outcome.STOPPED,
            steps=taken,
            noise_multiplier=plan.privacy.noise_multiplier,
            sampling_rate=plan.privacy.sampling_rate,
            clipping_norm=plan.privacy.clipping_norm,
        )
        self._set_status(pod, ended(0 if done else 143, message))

    def terminate(self, pod: Object) -> None:
        """End a pod that was asked to end, tell its last word, and let it go."""
        if is_running(pod):
            self.finish(pod)
        elif pod["status"].get("phase") == "Pending" and pod["spec"].get("nodeName"):
            self._set_status(pod, NEVER_FOUND)
        self.delete(pod, GONE)

    def delete(self, pod: Object, how: Deletion) -> None:
        """Delete a pod, as its kubelet or a person does."""
        if self._is_there(pod):
            self._cluster.delete(PODS, OWNER, pod["metadata"]["name"], how)

    def lose(self, pod: Object) -> None:
        """The pod is deleted past its kubelet, and whatever ran is dead.

        The Job controller's finalizer holds the object back until its end is counted.
        """
        self.delete(pod, GONE)

    def _start(self, pod: Object) -> None:
        plan = self._mounted_plan(pod)
        if plan is None:
            return
        self._on_start(_job(pod))
        self._plans[_job(pod)] = plan
        self._taken[pod["metadata"]["uid"]] = 0
        self._set_status(pod, RUNNING)

    def _mounted_plan(self, pod: Object) -> TrainingPlan | None:
        name = next(v["configMap"]["name"] for v in pod["spec"]["volumes"] if "configMap" in v)
        stored = self._cluster.store.get(("", "configmaps"), OWNER, name)
        if stored is None:
            return None
        return TrainingPlan.model_validate_json(stored.object["data"][PLAN_FILE])

    def _left(self, pod: Object) -> int:
        total = self._plans[_job(pod)].privacy.steps
        limit = total if self.patience is None else min(total, self.patience)
        return max(0, limit - self._taken[pod["metadata"]["uid"]])

    def _is_there(self, pod: Object) -> bool:
        stored = self._cluster.store.get(PODS.storage, OWNER, pod["metadata"]["name"])
        return stored is not None and stored.object["metadata"]["uid"] == pod["metadata"]["uid"]

    def _set_status(self, pod: Object, status: Object) -> None:
        self._change(pod, subresource="status", status=status)

    def _change(self, pod: Object, subresource: str = "", **fields: Any) -> None:
        self._cluster.modify(
            PODS, OWNER, pod["metadata"]["name"], lambda old: {**old, **fields}, subresource
        )


def is_running(pod: Object) -> bool:
    """Whether the pod's trainer runs."""
    return bool(pod["status"] == RUNNING)


def _job(pod: Object) -> str:
    uid: str = pod["metadata"]["labels"][JOB_UID]
    return uid
