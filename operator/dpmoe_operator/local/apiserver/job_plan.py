"""What a Job needs next: a pure function from the Job and its pods to a plan.

Follows the rules of Kubernetes' Job controller for both completion modes: which pods count as
succeeded or failed, which conditions the Job gets, which pods to create and to delete. A pod is
counted exactly once, when it loses the tracking finalizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from .job_indexes import Indexes
from .job_pods import (
    TRACKING_FINALIZER,
    Failures,
    format_indexes,
    format_time,
    index_of,
    parse_indexes,
    parse_time,
)
from .job_policies import failure_action, matched_rule
from .resources import Object


@dataclass
class JobPlan:
    """What to do about a Job.

    Attributes:
        status: the Job's next status.
        create: completion indexes of the pods to create; None for a pod without an index.
        delete: pods to delete; they lose their finalizer first and do not count.
        release: pods that were counted and lose their finalizer.
        stop: pods to delete; they count as failed once they have ended.
        told: by index, what a new pod knows of failures, where they are counted by index.
        failures: pods counted as failed, or ignored, by this plan.
        check_after: seconds until time alone changes something.
    """

    status: Object
    create: list[int | None] = field(default_factory=list)
    delete: list[Object] = field(default_factory=list)
    release: list[Object] = field(default_factory=list)
    stop: list[Object] = field(default_factory=list)
    told: dict[int, Failures] = field(default_factory=dict)
    failures: int = 0
    check_after: float | None = None


@dataclass
class _Tally:
    succeeded: int
    failed: int
    indexes: set[int]
    counted: list[Object] = field(default_factory=list)
    failures: int = 0
    fail_job: str = ""
    by_index: Indexes | None = None


def plan_job(
    job: Object,
    pods: Sequence[Object],
    now: datetime,
    backoff_seconds: float = 0.0,
    index_backoff: tuple[float, float] = (1.0, 60.0),
) -> JobPlan:
    """Plans the next step of a Job that is neither finished nor being deleted.

    Args:
        job: the Job.
        pods: all pods it controls.
        now: the present.
        backoff_seconds: for how long no pod may be created, because pods failed.
        index_backoff: first and longest wait, where failures are counted by index.
    """
    active = [each for each in pods if is_active(each)]
    tally = _count(job, pods, active)
    terminating = [each for each in pods if _is_terminating(each)]
    plan = JobPlan(
        _counts(job, tally, active, terminating), release=tally.counted, failures=tally.failures
    )
    if job["spec"]["suspend"]:
        _count_waiting(plan, tally)
        _suspend(plan, active, now)
        return plan
    _start(plan, now)
    _decide_end(job, plan, tally, active, now)
    if has_condition(plan.status, "FailureTarget") or has_condition(
        plan.status, "SuccessCriteriaMet"
    ):
        _count_waiting(plan, tally)
        _finish(plan, active, terminating, now)
        return plan
    if tally.by_index is not None:
        backoff_seconds = 0.0
    _scale(job, plan, tally, active, terminating, backoff_seconds)
    if tally.by_index is not None:
        _hold_back(plan, tally.by_index, len(active), now, index_backoff)
    return plan


def is_finished(job: Object) -> bool:
    """Whether a Job is complete or failed."""
    return has_condition(job["status"], "Complete") or has_condition(job["status"], "Failed")


def finish_time(job: Object) -> datetime:
    """When a finished Job ended."""
    condition = next(
        each for each in job["status"]["conditions"] if each["type"] in ("Complete", "Failed")
    )
    return parse_time(condition["lastTransitionTime"])


def is_active(pod: Object) -> bool:
    """Whether a pod runs or may yet run."""
    return "deletionTimestamp" not in pod["metadata"] and not _is_terminal(pod)


def has_condition(status: Object, kind: str) -> bool:
    """Whether a condition of this type is true."""
    conditions = status.get("conditions", ())
    return any(each["type"] == kind and each["status"] == "True" for each in conditions)


# Counting


def _count(job: Object, pods: Sequence[Object], active: Sequence[Object]) -> _Tally:
    """Counts the pods that ended since the last time."""
    status = job["status"]
    tally = _Tally(
        status.get("succeeded", 0),
        status.get("failed", 0),
        parse_indexes(status.get("completedIndexes", "")),
        by_index=Indexes.of(job),
    )
    for pod in pods:
        if TRACKING_FINALIZER not in pod["metadata"].get("finalizers", ()):
            continue
        if pod["status"].get("phase") == "Succeeded":
            _count_success(job, pod, tally)
        elif _is_failed(job, pod):
            _count_failure(job, pod, tally, active)
    return tally


def _count_success(job: Object, pod: Object, tally: _Tally) -> None:
    tally.counted.append(pod)
    if job["spec"]["completionMode"] == "NonIndexed":
        tally.succeeded += 1
    else:
        tally.indexes.add(index_of(pod))
        tally.succeeded = len(tally.indexes)


def _count_failure(job: Object, pod: Object, tally: _Tally, active: Sequence[Object]) -> None:
    action, message = "Count", ""
    if pod["status"].get("phase") == "Failed":
        action, message = failure_action(job, pod)
    if tally.by_index is not None and not tally.by_index.take(pod, action, active):
        return
    tally.counted.append(pod)
    tally.failures += 1
    if action != "Ignore":
        tally.failed += 1
    if action == "FailJob":
        tally.fail_job = tally.fail_job or message


def _is_failed(job: Object, pod: Object) -> bool:
    if pod["status"].get("phase") == "Failed":
        return True
    if "deletionTimestamp" not in pod["metadata"]:
        return False
    # A deleted pod that no node ever got will never reach a terminal phase.
    replaces_failed_only = job["spec"]["podReplacementPolicy"] == "Failed"
    return not replaces_failed_only or not pod["spec"].get("nodeName")


def _counts(
    job: Object, tally: _Tally, active: Sequence[Object], terminating: Sequence[Object]
) -> Object:
    status: Object = {**job["status"], "uncountedTerminatedPods": {}}
    status["ready"] = sum(has_condition(pod["status"], "Ready") for pod in active)
    status["terminating"] = len(terminating)
    _set_count(status, "active", len(active))
    _set_count(status, "succeeded", tally.succeeded)
    _set_count(status, "failed", tally.failed)
    if tally.indexes:
        status["completedIndexes"] = format_indexes(tally.indexes)
    if tally.by_index is not None:
        status["failedIndexes"] = tally.by_index.text()
    return status


def _count_waiting(plan: JobPlan, tally: _Tally) -> None:
    """Counts failed pods that will not be replaced any more."""
    if tally.by_index is None:
        return
    for pod, failures in tally.by_index.waiting.values():
        plan.release.append(pod)
        tally.failed += failures.counted > Failures.before(pod).counted
    tally.by_index.waiting.clear()
    _set_count(plan.status, "failed", tally.failed)


def _set_count(status: Object, name: str, count: int) -> None:
    """Zero is left out, as in Go's JSON."""
    status.pop(name, None)
    if count:
        status[name] = count


# Phases of a Job


def _suspend(plan: JobPlan, active: Sequence[Object], now: datetime) -> None:
    plan.delete = list(active)
    plan.status.pop("startTime", None)
    _set_count(plan.status, "active", 0)
    _set_condition(plan.status, "Suspended", "True", "JobSuspended", "Job suspended", now)


def _start(plan: JobPlan, now: datetime) -> None:
    if has_condition(plan.status, "Suspended"):
        _set_condition(plan.status, "Suspended", "False", "JobResumed", "Job resumed", now)
    plan.status.setdefault("startTime", format_time(now))


def _decide_end(
    job: Object, plan: JobPlan, tally: _Tally, active: Sequence[Object], now: datetime
) -> None:
    """Decides that the Job has failed or succeeded; its pods may still have to go."""
    spec, status = job["spec"], plan.status
    if has_condition(status, "FailureTarget") or has_condition(status, "SuccessCriteriaMet"):
        return
    left = _seconds_to_deadline(spec, status, now)
    plan.check_after = left
    by_index = tally.by_index.why_failed(spec, tally.succeeded) if tally.by_index else None
    rule = matched_rule(spec.get("successPolicy"), tally.indexes)
    if tally.fail_job:
        reason, message = "PodFailurePolicy", tally.fail_job
    elif rule is not None:
        message = f"Matched rules at index {rule}"
        _set_condition(status, "SuccessCriteriaMet", "True", "SuccessPolicy", message, now)
        return
    elif by_index is not None:
        reason, message = by_index
    elif tally.failed > spec["backoffLimit"]:
        reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    elif left is not None and left <= 0:
        reason, message = "DeadlineExceeded", "Job was active longer than specified deadline"
    elif _is_successful(spec, tally, active):
        message = "Reached expected number of succeeded pods"
        _set_condition(status, "SuccessCriteriaMet", "True", "CompletionsReached", message, now)
        return
    else:
        return
    _set_condition(status, "FailureTarget", "True", reason, message, now)


def _seconds_to_deadline(spec: Object, status: Object, now: datetime) -> float | None:
    if spec.get("activeDeadlineSeconds") is None:
        return None
    deadline = parse_time(status["startTime"]) + timedelta(seconds=spec["activeDeadlineSeconds"])
    return (deadline - now).total_seconds()


def _is_successful(spec: Object, tally: _Tally, active: Sequence[Object]) -> bool:
    if spec.get("completions") is None:
        return tally.succeeded > 0 and not active
    if spec["completionMode"] == "Indexed":
        return set(range(spec["completions"])) <= tally.indexes
    return bool(tally.succeeded >= spec["completions"])


def _finish(
    plan: JobPlan, active: Sequence[Object], terminating: Sequence[Object], now: datetime
) -> None:
    """Deletes what still runs; the Job is over once nothing does."""
    plan.check_after = None
    if has_condition(plan.status, "FailureTarget"):
        plan.stop = list(active)
    else:
        plan.delete = list(active)
    _set_count(plan.status, "active", 0)
    if active or terminating:
        return
    conditions = plan.status["conditions"]
    target = next(
        each for each in conditions if each["type"] in ("FailureTarget", "SuccessCriteriaMet")
    )
    failed = target["type"] == "FailureTarget"
    kind = "Failed" if failed else "Complete"
    _set_condition(plan.status, kind, "True", target["reason"], target["message"], now)
    if not failed:
        plan.status["completionTime"] = format_time(now)


def _scale(
    job: Object,
    plan: JobPlan,
    tally: _Tally,
    active: Sequence[Object],
    terminating: Sequence[Object],
    backoff_seconds: float,
) -> None:
    spec = job["spec"]
    waits_for_end = spec["podReplacementPolicy"] == "Failed"
    occupied = [*active, *(terminating if waits_for_end else ())]
    wanted = _wanted(spec, tally, active)
    if len(active) > wanted:
        plan.delete = sorted(active, key=_removal_order)[wanted:]
        _set_count(plan.status, "active", wanted)
        return
    missing = max(wanted - len(occupied), 0)
    lost = tally.by_index.failed if tally.by_index is not None else set()
    if missing and backoff_seconds > 0:
        plan.check_after = min(plan.check_after or backoff_seconds, backoff_seconds)
        return
    if spec["completionMode"] == "Indexed":
        taken = tally.indexes | lost | {index_of(pod) for pod in occupied}
        free = [index for index in range(spec["completions"]) if index not in taken]
        plan.create = list(free[:missing])
    else:
        plan.create = [None] * missing
    _set_count(plan.status, "active", len(active) + len(plan.create))


def _hold_back(
    plan: JobPlan, indexes: Indexes, active: int, now: datetime, backoff: tuple[float, float]
) -> None:
    """Creates no pod before its index's wait is over, and tells the others what failed before."""
    waits = {
        index: indexes.seconds_until(index, now, *backoff)
        for index in plan.create
        if index is not None
    }
    plan.create = [index for index, seconds in waits.items() if seconds <= 0]
    plan.told = {index: indexes.failures_of(index) for index in waits if waits[index] <= 0}
    later = [seconds for seconds in waits.values() if seconds > 0]
    if later:
        plan.check_after = min([*later, *([plan.check_after] if plan.check_after else [])])
    _set_count(plan.status, "active", active + len(plan.create))


def _wanted(spec: Object, tally: _Tally, active: Sequence[Object]) -> int:
    parallelism: int = spec["parallelism"]
    if spec.get("completions") is None:
        return min(parallelism, len(active)) if tally.succeeded else parallelism
    completions: int = spec["completions"]
    failed = len(tally.by_index.failed) if tally.by_index is not None else 0
    return min(parallelism, completions - tally.succeeded - failed)


def _removal_order(pod: Object) -> tuple[int, str]:
    """Low indexes and old pods stay."""
    return index_of(pod), pod["metadata"]["creationTimestamp"]


# Pods and conditions


def _is_terminal(pod: Object) -> bool:
    return pod["status"].get("phase") in ("Succeeded", "Failed")


def _is_terminating(pod: Object) -> bool:
    return "deletionTimestamp" in pod["metadata"] and not _is_terminal(pod)


def _set_condition(
    status: Object, kind: str, value: str, reason: str, message: str, now: datetime
) -> None:
    """Sets a condition unless it already says so."""
    conditions = status.get("conditions", [])
    if any(each["type"] == kind and each["status"] == value for each in conditions):
        return
    condition = {
        "type": kind,
        "status": value,
        "lastProbeTime": format_time(now),
        "lastTransitionTime": format_time(now),
        "reason": reason,
        "message": message,
    }
    status["conditions"] = [each for each in conditions if each["type"] != kind] + [condition]
