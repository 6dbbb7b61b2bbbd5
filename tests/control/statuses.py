"""Statuses as tests ask for them: of a job without budget, and of one that has some."""

from datetime import timedelta
from typing import Any

from tests.builders import (
    NOW,
    SETTINGS,
    Object,
    block,
    commit,
    job,
    launched,
    snapshot,
    with_accounts,
)
from tests.control.workloads import report, workload

from dpmoe_operator.api.dpmoejob import DPMoEJobStatus
from dpmoe_operator.api.privateblock import PrivateBlockStatus
from dpmoe_operator.control.decide import decide
from dpmoe_operator.control.job_status import Waiting, job_status
from dpmoe_operator.control.planning import Planner
from dpmoe_operator.control.pods import PodView
from dpmoe_operator.control.settlement import Verdict, settle
from dpmoe_operator.control.views import JobView, WorkloadView

LATER = NOW + timedelta(minutes=5)


def condition(status: DPMoEJobStatus | PrivateBlockStatus, kind: str) -> Any:
    assert status.conditions is not None
    return next((c for c in status.conditions if c.type == kind), None)


def without_grant(waiting: Waiting, **fields: Any) -> DPMoEJobStatus:
    asked = job(uid="u", **fields)
    seen = snapshot([], [asked])
    suspended = bool(asked["spec"].get("suspend"))
    return job_status(JobView.of(asked), seen, waiting=waiting, suspended=suspended)


class Granted:
    """One granted job, its ledger, and its status with whatever is added."""

    def __init__(self, **fields: Any) -> None:
        blocks = [block()]
        self.job = job(uid="job-1", **fields)
        self.ledger = with_accounts(*blocks)
        seen = snapshot(blocks, [self.job], ledger=self.ledger)
        decision = decide(seen, SETTINGS, Planner(SETTINGS))
        commit(self.ledger, *decision.records)
        self.digest = decision.plans["job-1"].plan.digest()
        self.mechanism: Object = decision.plans["job-1"].plan.privacy.model_dump(
            include={"noise_multiplier", "sampling_rate", "clipping_norm"}
        )

    def report(self, **fields: Any) -> str:
        return report(fields.pop("plan_digest", self.digest), **self.mechanism | fields)

    def launch(self) -> None:
        commit(self.ledger, launched("job-1"))

    def settle(self, outcome: str, steps: int, message: str = "") -> None:
        grant = self.ledger.grants["job-1"]
        commit(
            self.ledger, settle(grant, Verdict(outcome, steps, message), self.ledger), time=LATER
        )

    def status(
        self, *pods: PodView, old: Object | None = None, now: Any = NOW, **rest: Any
    ) -> DPMoEJobStatus:
        manifest = self.job | {"status": old or {}}
        views = {"job-1": WorkloadView.of(workload(active=1), pods)} if pods else {}
        seen = snapshot([], [manifest], ledger=self.ledger, workloads=views, now=now, **rest)
        return job_status(JobView.of(manifest), seen, waiting=None, suspended=False)
