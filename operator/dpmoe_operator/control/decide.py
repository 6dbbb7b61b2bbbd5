"""decide(snapshot) → what to commit; react(snapshot) → what to do. Both pure.

A round commits first: accounts to open, grants to settle, launches, new grants, together in the
ledger. Only then, on the state that the commit left, does it touch the cluster. So nothing runs
that the ledger does not hold, and a crash anywhere leaves work that the next round finds again.

The life of a grant:

    granted → Job created, suspended → launched (in the ledger) → released → ended → settled

A grant without the launched record has provably started nothing. A Job that was released and is
suspended again is over, unless it keeps checkpoints: a second start would spend a second time.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from dpmoe_operator.api import dpmoejob, privateblock
from dpmoe_operator.api.base import StatusModel
from dpmoe_operator.api.ledgerentry import Launched, ObjectReference, Record, Settled
from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.control.access import Refusal
from dpmoe_operator.control.accounts import Standing, standings, to_open, to_retire
from dpmoe_operator.control.actions import (
    Action,
    DeleteJob,
    Prepare,
    Remove,
    SetStatus,
    status_write,
)
from dpmoe_operator.control.allocation import Allocation, allocate
from dpmoe_operator.control.job_status import job_status, timed_out
from dpmoe_operator.control.market import Market
from dpmoe_operator.control.planning import Planned, Planner
from dpmoe_operator.control.projection import block_status
from dpmoe_operator.control.rows import account_name
from dpmoe_operator.control.settings import Settings
from dpmoe_operator.control.settlement import (
    Verdict,
    may_learn_more,
    settle,
    steps_shown,
    verdict_of_ended,
    verdict_of_stolen_start,
    verdict_of_unlaunched,
    verdict_of_vanished,
)
from dpmoe_operator.control.steering import steer
from dpmoe_operator.control.times import parse_time
from dpmoe_operator.control.views import BlockView, JobView, Meta, Snapshot, WorkloadView
from dpmoe_operator.launch.launching import Launch
from dpmoe_operator.ledger.account import Grant
from dpmoe_operator.ledger.fold import LedgerState
from dpmoe_trainer.contract import JobReference


@dataclass(frozen=True)
class Decision:
    """What a round found out.

    Attributes:
        records: what must be committed before anything else happens.
        allocation: which waiting jobs got budget, and why the others wait.
        plans: of every job that could be planned, by uid.
    """

    records: tuple[Record, ...]
    allocation: Allocation
    plans: Mapping[str, Planned]


def decide(
    snapshot: Snapshot, settings: Settings, planner: Planner, market: Market | None = None
) -> Decision:
    """What the ledger must take in now.

    Args:
        snapshot: what the operator sees.
        settings: policy, image, namespace.
        planner: plans jobs, and remembers plans of manifests that did not change.
        market: remembers prices between rounds; None to start afresh.
    """
    judged = standings(snapshot)
    plans, refusals = _plan_all(snapshot, judged, planner)
    allocation = allocate(snapshot, settings, judged, plans, refusals, market)
    records = [Record(account_opened=opened) for opened in to_open(snapshot)]
    records += [Record(account_retired=retired) for retired in to_retire(snapshot)]
    records += [Record(settled=settled) for settled in _settlements(snapshot, plans, refusals)]
    records += [Record(launched=launched) for launched in _launches(snapshot, plans)]
    records += [Record(granted=granted) for granted in allocation.granted]
    return Decision(tuple(records), allocation, plans)


def react(snapshot: Snapshot, decision: Decision, settings: Settings) -> list[Action]:
    """What to do in the cluster, on the ledger as the commit left it, launches first.

    Args:
        snapshot: as in `decide`, with the ledger after the commit.
        decision: what `decide` found.
        settings: as in `decide`.
    """
    judged = standings(snapshot)
    return [
        *_workload_actions(snapshot, decision, judged, settings),
        *_job_statuses(snapshot, decision),
        *_block_statuses(snapshot, decision, judged, settings),
        *_expired(snapshot),
    ]


def _plan_all(
    snapshot: Snapshot, judged: Mapping[tuple[str, str], Standing], planner: Planner
) -> tuple[dict[str, Planned], dict[str, Refusal]]:
    """Plan every job that may still need its plan: those without a settled grant."""
    plans: dict[str, Planned] = {}
    refusals: dict[str, Refusal] = {}
    for uid, job in snapshot.jobs.items():
        grant = snapshot.ledger.grants.get(uid)
        if uid in snapshot.ledger.closed or (grant is not None and grant.settled is not None):
            continue
        try:
            if grant is None:
                _refuse_second_grant(job)
            plans[uid] = planner.plan(
                job,
                judged,
                tuple(grant.amounts) if grant else (),
                grant.granted.plan_digest if grant else None,
            )
        except Refusal as refusal:
            refusals[uid] = refusal
    return plans, refusals


def _refuse_second_grant(job: JobView) -> None:
    """A job that the ledger does not know was never granted, unless its own status says so.

    The status is written after the commit. So the ledger lost the grant, or this is another one.
    """
    entry = job.status.get("grantEntry") or job.status.get("settlementEntry")
    if entry:
        raise Refusal(
            Reason.GRANT_MISSING,
            f"status.grantEntry: {entry!r}: the ledger knows no grant of this job: it was lost or"
            " taken back, or this is another one; put its entries back from the anchor (dpmoe"
            " ledger recover), a job is never granted a second time",
        )


def _open_grants(snapshot: Snapshot) -> Iterator[tuple[str, Grant]]:
    """Grants to decide about: unsettled, and run where the operator may look."""
    for uid, grant in snapshot.ledger.grants.items():
        if grant.settled is None:
            places = data_namespaces(
                snapshot.ledger, grant, snapshot.jobs, snapshot.blocks.values()
            )
            if places.isdisjoint(snapshot.unserved):
                yield uid, grant


def data_namespaces(
    ledger: LedgerState,
    grant: Grant,
    jobs: Mapping[str, JobView],
    blocks: Iterable[BlockView],
) -> set[str]:
    """The data namespaces in which something of an open grant may be: one, mostly.

    A hub's data may have moved since its account was opened, to a block in another namespace.

    Args:
        ledger: holds the accounts.
        grant: the grant.
        jobs: all DPMoEJobs, by uid.
        blocks: all blocks.
    """
    if grant.launched is not None:
        return {grant.launched.workload.namespace}
    job = jobs.get(grant.granted.job.uid)
    if job is not None and job.spec is not None:
        return {job.spec.blocks.namespace}
    account = grant.granted.charges[0].account
    live = [block for block in blocks if block.spec and account_name(block) == account]
    return {block.meta.namespace for block in live} or {
        ledger.accounts[account].opened.block.namespace
    }


def _settlements(
    snapshot: Snapshot, plans: Mapping[str, Planned], refusals: Mapping[str, Refusal]
) -> Iterator[Settled]:
    for uid, grant in _open_grants(snapshot):
        verdict = _verdict(snapshot, uid, grant, plans, refusals)
        if verdict is not None:
            yield settle(grant, verdict, snapshot.ledger)


def _verdict(
    snapshot: Snapshot,
    uid: str,
    grant: Grant,
    plans: Mapping[str, Planned],
    refusals: Mapping[str, Refusal],
) -> Verdict | None:
    """How an open grant ends now, or None if it goes on."""
    workload = snapshot.workloads.get(uid)
    if grant.launched is None:
        if workload is not None and workload.may_have_run:
            return verdict_of_stolen_start(grant)
        if uid not in snapshot.jobs:
            return verdict_of_unlaunched("the DPMoEJob was deleted before its launch")
        if uid in refusals:
            return verdict_of_unlaunched(
                f"the plan does not hold any more: {refusals[uid].message}"
            )
        if plans[uid].reservation.plan_digest != grant.granted.plan_digest:
            return verdict_of_unlaunched(
                "a block or the job changed between grant and launch; apply the job again"
            )
        return None
    if workload is None or workload.meta.uid != grant.launched.workload.uid:
        return verdict_of_vanished(grant)
    if workload.cancelled and not workload.released:
        if workload.may_have_run:
            return verdict_of_stolen_start(grant)
        return verdict_of_unlaunched("the DPMoEJob was deleted before its pods were released")
    shown = steps_shown(snapshot, uid)
    if workload.over and workload.confirmed and not may_learn_more(grant, workload, shown):
        why = "not within its start timeout" if uid in snapshot.jobs else "its DPMoEJob was deleted"
        return verdict_of_ended(grant, workload, shown, why)
    return None


def _launches(snapshot: Snapshot, plans: Mapping[str, Planned]) -> Iterator[Launched]:
    for uid, grant in _open_grants(snapshot):
        workload = snapshot.workloads.get(uid)
        if (
            grant.launched is None
            and workload is not None
            and not workload.may_have_run
            and uid in snapshot.prepared
            and uid in plans
            and plans[uid].reservation.plan_digest == grant.granted.plan_digest
        ):
            yield Launched(job=grant.granted.job, workload=_reference(workload.meta))


def _reference(meta: Meta) -> ObjectReference:
    return ObjectReference(namespace=meta.namespace, name=meta.name, uid=meta.uid)


def _workload_actions(
    snapshot: Snapshot,
    decision: Decision,
    judged: Mapping[tuple[str, str], Standing],
    settings: Settings,
) -> Iterator[Action]:
    for uid, grant in _open_grants(snapshot):
        planned = decision.plans.get(uid)
        workload = snapshot.workloads.get(uid)
        if grant.launched is None and planned is not None and uid not in snapshot.prepared:
            yield Prepare(_launch(planned, grant, judged, settings))
        elif grant.launched is not None and workload is not None:
            yield from steer(snapshot, grant, workload, settings)
    for uid, workload in snapshot.workloads.items():
        if _is_orphan(snapshot, uid, workload):
            yield Remove(workload.meta.namespace, workload.meta.name, workload.meta.uid)


def _is_orphan(snapshot: Snapshot, uid: str, workload: WorkloadView) -> bool:
    """A Job without an open grant, unless it is over for good and its DPMoEJob is still there.

    A Job that is only suspended could be resumed by hand, and would then spend without a grant.
    """
    kept = uid in snapshot.jobs and workload.outcome is not None
    if uid in snapshot.ledger.closed:
        return not kept
    grant = snapshot.ledger.grants.get(uid)
    if grant is None:
        return True
    if grant.settled is None:
        return False
    ours = grant.launched is not None and grant.launched.workload.uid == workload.meta.uid
    return not (kept and ours)


def _launch(
    planned: Planned,
    grant: Grant,
    judged: Mapping[tuple[str, str], Standing],
    settings: Settings,
) -> Launch:
    spec = planned.job.spec
    assert spec is not None
    chosen = [judged[block.namespace, block.name].spec for block in planned.plan.blocks]
    evaluation = [spec.evaluation for spec in chosen if spec.evaluation is not None]
    return Launch(
        job=JobReference(**grant.granted.job.model_dump()),
        spec=spec,
        namespace=spec.blocks.namespace,
        plan_json=planned.plan.to_json(),
        image=grant.granted.image,
        tables=[*(block.dataset for block in chosen), *evaluation[:1]],
        gpu_resource=settings.gpu_resource,
        storage_cidrs=settings.storage_cidrs,
        operator_labels=dict(settings.progress_labels),
        operator_namespace=settings.namespace,
        user=settings.pods_run_as,
        grace_seconds=settings.grace_seconds,
        env=settings.trainer_env,
        checkpoints=planned.checkpoints,
        gang=settings.gangs,
    )


def _job_statuses(snapshot: Snapshot, decision: Decision) -> Iterator[SetStatus]:
    """Statuses of jobs, those that have budget first: there may be thousands that wait."""
    ledger = snapshot.ledger
    for uid, job in sorted(snapshot.jobs.items(), key=lambda item: not ledger.knows(item[0])):
        waiting = decision.allocation.waiting.get(uid)
        if waiting is None and not snapshot.ledger.knows(uid):
            continue
        closed = snapshot.ledger.closed.get(uid)
        if closed is not None and job.status.get("settlementEntry") == closed.entry:
            # It says more than the ledger still does.
            continue
        status = job_status(
            job, snapshot, waiting=waiting, suspended=bool(job.spec and job.spec.suspend)
        )
        yield from _changed(dpmoejob.PLURAL, dpmoejob.KIND, job, status)


def _block_statuses(
    snapshot: Snapshot,
    decision: Decision,
    judged: Mapping[tuple[str, str], Standing],
    settings: Settings,
) -> Iterator[SetStatus]:
    asking = _asking(snapshot, decision)
    for standing in judged.values():
        name = standing.account_name or ""
        unlocked = decision.allocation.unlocked.get(name)
        status = block_status(
            standing,
            snapshot,
            waiting=asking.get(name, 0),
            unlocked=unlocked.amounts if unlocked else None,
            next_unlock=unlocked.complete_at if unlocked else None,
            anchored=settings.anchored,
        )
        yield from _changed(privateblock.PLURAL, privateblock.KIND, standing.block, status)


def _asking(snapshot: Snapshot, decision: Decision) -> dict[str, int]:
    """How many jobs wait for each account."""
    count: dict[str, int] = {}
    for uid in decision.allocation.waiting:
        if uid not in decision.plans or timed_out(snapshot.jobs[uid], snapshot.now):
            continue
        for account in decision.plans[uid].accounts:
            count[account] = count.get(account, 0) + 1
    return count


def _changed(
    plural: str, kind: str, view: JobView | BlockView, status: StatusModel
) -> Iterator[SetStatus]:
    write = status_write(plural, kind, view, status.to_object())
    if write is not None:
        yield write


def _expired(snapshot: Snapshot) -> Iterator[DeleteJob]:
    for uid, job in snapshot.jobs.items():
        ttl = job.spec.ttl_seconds_after_finished if job.spec else None
        end = _end_of(job, snapshot)
        if ttl is not None and end is not None and (snapshot.now - end).total_seconds() > ttl:
            yield DeleteJob(job.meta.namespace, job.meta.name, uid, job.meta.resource_version)


def _end_of(job: JobView, snapshot: Snapshot) -> datetime | None:
    if snapshot.ledger.knows(job.meta.uid):
        settled = snapshot.ledger.settlement_time(job.meta.uid)
        return parse_time(settled) if settled else None
    if timed_out(job, snapshot.now):
        assert job.spec is not None
        assert job.spec.timeout_seconds is not None
        return job.meta.created + timedelta(seconds=job.spec.timeout_seconds)
    return None
