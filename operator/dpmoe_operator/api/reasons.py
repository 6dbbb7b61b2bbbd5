"""Why a job waits or never runs: one fixed list, worst first.

A job has exactly one reason at a time, the worst that holds. The names appear in conditions,
events and metrics, so they are part of the API: they are added to, never renamed.
"""

from enum import StrEnum


class Reason(StrEnum):
    """A cause, as `status.conditions[].reason` names it; permanent causes come first."""

    GRANT_MISSING = "GrantMissing"
    """The job's status says that it was granted, and the ledger knows nothing of it."""

    BLOCK_NOT_FOUND = "BlockNotFound"
    """A block that the job asks for doesn't exist, or too few match its selector."""

    BLOCK_NOT_SHARED = "BlockNotShared"
    """The block's owner doesn't open it to the job's namespace for what the job wants."""

    BLOCK_RETIRED = "BlockRetired"
    """The block's owner retired it: no grant on its data any more, for ever."""

    INVALID_SPEC = "InvalidSpec"
    """The manifest contradicts itself, its blocks, or what privacy accounting can give."""

    DEMAND_EXCEEDS_CAPACITY = "DemandExceedsCapacity"
    """The plan doesn't fit even into an empty block, at any order: it can never run."""

    BLOCK_EXHAUSTED = "BlockExhausted"
    """The plan doesn't fit into what others have not consumed for ever: it never will again."""

    SUSPENDED = "Suspended"
    """The job's author paused it."""

    WAITING_FOR_REFUND = "WaitingForRefund"
    """The plan would fit only if running jobs gave back what they reserved and won't spend."""

    WAITING_FOR_UNLOCK = "WaitingForUnlock"
    """The budget is there, but the block has not released enough of it yet."""

    OUTRANKED = "Outranked"
    """The plan fitted when the round began, but other jobs went first and took the budget."""

    LEDGER_FROZEN = "LedgerFrozen"
    """Nothing is granted: the ledger is not what it was, and somebody must look at it."""

    PENDING_EVALUATION = "PendingEvaluation"
    """No round has looked at the job yet."""
