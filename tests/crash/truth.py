"""What is true whoever knows it, and the rules that hold about it.

The log is folded by the operator's own fold, which is the check of its rules, and once more by
nobody's. What an operator wrote and no restored backup may undo stays true: it is in the anchor.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tests.builders import SETTINGS, Object
from tests.crash.nodes import Nodes, is_running

from dpmoe_operator.launch.launching import JOB_UID
from dpmoe_operator.ledger.account import Grant
from dpmoe_operator.ledger.anchor import Anchor
from dpmoe_operator.ledger.entry import GENESIS
from dpmoe_operator.ledger.fold import LedgerState
from dpmoe_operator.local.apiserver.cluster import Cluster
from dpmoe_operator.privacy.units import format_epsilon

GROUP = "dpmoe.dev"
ONCE = ("accountOpened", "accountRetired", "granted", "launched", "settled")
"""Kinds of records that a log holds once for each account or job."""


class Truth:
    """The log as it ever was, and the pods as they are."""

    def __init__(self, cluster: Cluster, nodes: Nodes, anchor: Path) -> None:
        self._cluster, self._nodes, self._anchor = cluster, nodes, anchor
        self._state = LedgerState()
        self._digests: list[str] = []

    def entries(self) -> list[Object]:
        """The log as the server has it."""
        found = self._cluster.store.scan((GROUP, "ledgerentries"), SETTINGS.namespace)
        return [stored.object for stored in found]

    @property
    def ledger(self) -> LedgerState:
        """The fold of all that ever committed; raises `LedgerError` if it breaks a rule."""
        fork = self.fork()
        for manifest in self.entries():
            sequence, digest = manifest["spec"]["sequence"], manifest["spec"]["digest"]
            if digest == fork:
                held = {entry["spec"]["digest"] for entry in Anchor(self._anchor).entries()}
                assert digest not in held, f"entry {sequence} took effect twice"
                break
            if sequence == len(self._digests):
                self._state.apply(manifest)
                self._digests.append(digest)
            assert self._digests[sequence] == digest, f"entry {sequence} was written anew"
        return self._state

    def fork(self) -> str | None:
        """The digest of the log's last entry, if it stands where another one was taken back.

        An operator that stood still since before then, just before its call, writes such a one.
        """
        last = self._last()
        if not 0 <= last < len(self._digests):
            return None
        digest: str = self.entries()[-1]["spec"]["digest"]
        return None if digest == self._digests[last] else digest

    @property
    def taken_back(self) -> bool:
        """Whether the log lacks an entry, or ends with another one in its place."""
        return len(self.entries()) < len(self._digests) or self.fork() is not None

    def _last(self) -> int:
        """Number of the last entry that the server has; −1 where it has none."""
        entries = self.entries()
        return entries[-1]["spec"]["sequence"] if entries else -1

    def was_taken_back(self, before: list[Object]) -> None:
        """The log is shorter now. What the anchor had not taken in has never been.

        Args:
            before: the entries that it had.
        """
        head = Anchor(self._anchor).head()
        assert head is not None
        last = max(self._last(), head.sequence)
        self._state, self._digests = LedgerState(), []
        for manifest in before[: last + 1]:
            self._state.apply(manifest)
            self._digests.append(manifest["spec"]["digest"])

    # At every moment

    def check_start(self, job_uid: str) -> None:
        """A container is about to start and will see data."""
        grant = self.ledger.grants.get(job_uid)
        assert grant is not None, f"{job_uid} starts without a grant"
        assert grant.launched is not None, f"{job_uid} starts before its launch is in the ledger"
        _check_paid(grant)

    def check(self) -> None:
        """Never over budget, and nothing runs or ran unpaid."""
        ledger = self.ledger
        for name, account in ledger.accounts.items():
            spent = zip(account.spending.total, account.capacity, strict=True)
            assert any(total <= capacity for total, capacity in spent), name
        for uid, taken in self._nodes.steps.items():
            grant = ledger.grants[uid]
            paid = grant.granted.steps if grant.settled is None else grant.settled.steps
            assert taken <= paid, f"{uid} took {taken} steps, {paid} are paid: {grant.settled}"
        for pod in filter(is_running, self._nodes.pods()):
            _check_paid(ledger.grants[pod["metadata"]["labels"][JOB_UID]])

    # Once nothing moves any more

    def check_log(self) -> None:
        """The raw log with its archive: one chain, and of everything only one."""
        counts: Counter[tuple[str, str]] = Counter()
        previous, sequence = GENESIS, -1
        for sequence, entry in enumerate(Anchor(self._anchor).entries()):
            spec = entry["spec"]
            assert (spec["sequence"], spec["previous"]) == (sequence, previous)
            previous = spec["digest"]
            for record in spec["records"]:
                ((kind, content),) = record.items()
                if kind in ONCE:
                    key = content["account"] if "account" in content else content["job"]["uid"]
                    counts[kind, key] += 1
        assert sequence == self._last()
        assert set(counts.values()) <= {1}, counts
        for kind, key in counts:
            if kind in ("launched", "settled"):
                assert ("granted", key) in counts, (kind, key)

    def check_statuses(self, blocks: Mapping[str, Object], jobs: Mapping[str, Object]) -> None:
        """What people read is what the log says."""
        for block in blocks.values():
            if block["status"]["state"] != "Refused":
                self._check_block(block["status"])
        for uid, job in jobs.items():
            self._check_job(uid, job["status"])

    def _check_block(self, status: Object) -> None:
        spending = self.ledger.accounts[status["account"]].spending
        told = [(each["reserved"], each["consumed"]) for each in status["orders"]]
        assert told == [
            (format_epsilon(reserved), format_epsilon(consumed))
            for reserved, consumed in zip(spending.reserved, spending.consumed, strict=True)
        ]
        assert status["jobs"] == spending.jobs

    def _check_job(self, uid: str, status: Object) -> None:
        grant = self.ledger.grants.get(uid)
        assert status.get("grantEntry") == (grant.entry if grant else None)
        assert status.get("settlementEntry") == (grant.settlement_entry if grant else None)
        if grant is not None and grant.settled is not None:
            assert status["stepsDone"] == grant.settled.steps
            assert status["reason"] == grant.settled.outcome
            assert (status["state"] == "Completed") == (grant.settled.outcome == "Completed")


def _check_paid(grant: Grant) -> None:
    """What runs is reserved, or charged in full: its Job may be gone, and its pod not yet."""
    assert grant.settled is None or grant.settled.steps == grant.granted.steps, grant.settled
