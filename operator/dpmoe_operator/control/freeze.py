"""What people read while nothing is granted, since the ledger cannot be relied on.

Blocks keep the numbers that they showed last; jobs that have budget go on, and are settled later.
"""

from collections.abc import Iterator

from dpmoe_operator.api import dpmoejob, privateblock
from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.control.actions import SetStatus, status_write
from dpmoe_operator.control.projection import LEDGER_VERIFIED, conditions_of
from dpmoe_operator.control.views import Snapshot


def frozen(snapshot: Snapshot, reason: str, problem: str) -> list[SetStatus]:
    """The statuses that say why granting is frozen.

    Args:
        snapshot: blocks and jobs; its ledger is not looked at.
        reason: one word for the condition.
        problem: what is wrong, and what to do.
    """
    message = f"granting is frozen: {problem}"
    return [*_blocks(snapshot, reason, message), *_waiting_jobs(snapshot, message)]


def _blocks(snapshot: Snapshot, reason: str, message: str) -> Iterator[SetStatus]:
    for block in snapshot.blocks.values():
        generation = block.meta.generation
        wanted = [
            ("Ready", "False", reason, message),
            (LEDGER_VERIFIED, "False", reason, message),
        ]
        status = {
            "state": "Frozen",
            "reason": reason,
            "message": message[:2048],
            "observedGeneration": generation,
            "conditions": conditions_of(block.status, wanted, generation, snapshot.now),
        }
        write = status_write(privateblock.PLURAL, privateblock.KIND, block, status, whole=False)
        if write is not None:
            yield write


def _waiting_jobs(snapshot: Snapshot, message: str) -> Iterator[SetStatus]:
    """Jobs that never had budget, as far as their own status says: the ledger cannot be asked."""
    for job in snapshot.jobs.values():
        if job.status.get("grantEntry") or job.status.get("settlementEntry"):
            continue
        generation, reason = job.meta.generation, str(Reason.LEDGER_FROZEN)
        wanted = [("BudgetReserved", "False", reason, message)]
        status = {
            "state": "Pending",
            "reason": reason,
            "message": message[:2048],
            "observedGeneration": generation,
            "conditions": conditions_of(job.status, wanted, generation, snapshot.now),
        }
        write = status_write(dpmoejob.PLURAL, dpmoejob.KIND, job, status, whole=False)
        if write is not None:
            yield write
