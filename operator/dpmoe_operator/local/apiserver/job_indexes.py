"""Failures that a Job counts for each of its indexes (`backoffLimitPerIndex`): pure.

As in Kubernetes, a failed pod is counted once its replacement is there, or none will be: until then
it keeps the tracking finalizer, and its annotations alone know how often its index failed.
A suspended Job counts what it has, and forgets the rest: after it every index begins at zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from .job_pods import Failures, format_indexes, index_of, parse_indexes, parse_time
from .resources import Object


@dataclass
class Indexes:
    """Of a Job that counts by index.

    Attributes:
        limit: failures that each index may have.
        failed: indexes that failed for good.
        ending: the Job is being ended, so that no failure is an index's any more.
        waiting: by index, the failed pod that waits for its replacement, and what that will know.
    """

    limit: int
    failed: set[int]
    ending: bool = False
    waiting: dict[int, tuple[Object, Failures]] = field(default_factory=dict)

    @classmethod
    def of(cls, job: Object) -> "Indexes | None":
        """The state so far; None where the Job counts for all of its pods together."""
        limit = job["spec"].get("backoffLimitPerIndex")
        if limit is None:
            return None
        conditions = job["status"].get("conditions", ())
        ends = ("FailureTarget", "SuccessCriteriaMet")
        ending = any(each["type"] in ends and each["status"] == "True" for each in conditions)
        return cls(limit, parse_indexes(job["status"].get("failedIndexes", "")), ending)

    def take(self, pod: Object, action: str, live: Sequence[Object]) -> bool:
        """Notes a failed pod, by the action of its failure policy; whether it is counted now.

        Args:
            pod: the failed pod.
            action: of the failure policy.
            live: pods of the Job that run or may yet run.
        """
        if self.ending:
            return True
        index = index_of(pod)
        failures = Failures.before(pod).and_one(ignored=action == "Ignore")
        if index in self.failed or action == "FailIndex" or failures.counted > self.limit:
            self.failed.add(index)
            return True
        if action == "FailJob" or any(index_of(other) == index for other in live):
            return True
        known = self.waiting.get(index)
        if known is not None and _total(known[1]) >= _total(failures):
            return True
        self.waiting[index] = pod, failures
        return False

    def text(self) -> str:
        """As `failedIndexes` in a status."""
        return format_indexes(self.failed)

    def failures_of(self, index: int) -> Failures:
        """What a new pod of the index is told."""
        return self.waiting[index][1] if index in self.waiting else Failures()

    def seconds_until(self, index: int, now: datetime, first: float, longest: float) -> float:
        """How long the index's next pod has to wait: doubles from failure to failure."""
        if index not in self.waiting:
            return 0.0
        pod, failures = self.waiting[index]
        delay = min(first * 2 ** (_total(failures) - 1), longest)
        return delay - (now - _end_of(pod)).total_seconds()

    def why_failed(self, spec: Object, succeeded: int) -> tuple[str, str] | None:
        """Reason and message where the failed indexes end the Job."""
        most = spec.get("maxFailedIndexes")
        if most is not None and len(self.failed) > most:
            message = "Job has exceeded the specified maximal number of failed indexes"
            return "MaxFailedIndexesExceeded", message
        if self.failed and len(self.failed) + succeeded >= spec["completions"]:
            return "FailedIndexes", "Job has failed indexes"
        return None


def _total(failures: Failures) -> int:
    return failures.counted + failures.ignored


def _end_of(pod: Object) -> datetime:
    """When a failed pod ended, as far as it says."""
    states = [each.get("state", {}) for each in pod["status"].get("containerStatuses", ())]
    ends = [state.get("terminated", {}).get("finishedAt") for state in states]
    if ends and all(ends):
        return max(parse_time(end) for end in ends)
    metadata = pod["metadata"]
    return parse_time(metadata.get("deletionTimestamp", metadata["creationTimestamp"]))
