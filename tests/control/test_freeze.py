"""What people read while granting is frozen: why, and what to do; nothing else changes."""

from typing import Any

from tests.builders import block, job, snapshot

from dpmoe_operator.control.actions import SetStatus
from dpmoe_operator.control.freeze import frozen


def written(*objects: Any, blocks: bool) -> list[SetStatus]:
    seen = snapshot(objects, ()) if blocks else snapshot((), objects)
    return frozen(seen, "RolledBack", "the log ends too early; run recover")


def conditions(patch: Any) -> dict[str, tuple[str, str]]:
    return {c["type"]: (c["status"], c["reason"]) for c in patch["conditions"]}


def test_block_says_why_and_keeps_its_numbers() -> None:
    shown = {"state": "Ready", "reason": "BudgetAvailable", "consumed": "2", "jobs": 4}
    [write] = written(block(status=shown), blocks=True)
    assert conditions(write.patch) == {
        "Ready": ("False", "RolledBack"),
        "LedgerVerified": ("False", "RolledBack"),
    }
    assert (write.patch["state"], write.patch["reason"]) == ("Frozen", "RolledBack")
    assert write.patch.keys().isdisjoint({"consumed", "jobs"})
    assert write.event is not None
    kind, reason, message = write.event
    assert (kind, reason) == ("Warning", "RolledBack")
    assert message == "granting is frozen: the log ends too early; run recover"


def test_waiting_job_says_why() -> None:
    waiting = {"state": "Pending", "reason": "Outranked", "epsilon": "1"}
    [write] = written(job(status=waiting), blocks=False)
    assert write.patch["reason"] == "LedgerFrozen"
    assert conditions(write.patch) == {"BudgetReserved": ("False", "LedgerFrozen")}
    assert "epsilon" not in write.patch


def test_job_with_budget_is_left_alone() -> None:
    running = {"state": "Running", "reason": "Training", "grantEntry": "entry-000000000001"}
    assert written(job(status=running), blocks=False) == []


def test_said_once() -> None:
    """The loop says it every few seconds; the API server hears it once."""
    seen = snapshot([block(uid="b")], [job(uid="j")])
    writes = {write.uid: write for write in frozen(seen, "AnchorLost", "gone")}
    again = snapshot(
        [block(uid="b", status=writes["b"].patch)], [job(uid="j", status=writes["j"].patch)]
    )
    assert frozen(again, "AnchorLost", "gone") == []
    assert len(frozen(again, "RolledBack", "gone")) == 1, "only the block names the reason"
