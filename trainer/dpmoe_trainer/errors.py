"""How a run ends early: refusals, each with the exit code that the operator reads, and failures.

Their messages are for people and leave the data's namespace: they name a field, its value in the
plan and the remedy, and never hold anything that was read from a private table.
"""

from typing import ClassVar

from dpmoe_trainer.contract import ExitCode


class Refusal(Exception):
    """Base of all refusals: this attempt drew no step, and usually touched no data."""

    code: ClassVar[ExitCode] = ExitCode.BAD_PLAN

    may_pass: ClassVar[bool] = False
    """Whether a fault of the machine, volume or network looks the same; another try may tell."""


class BadPlan(Refusal):
    """The plan, the command line or the environment asks for what this trainer cannot do."""

    may_pass = True


class UncoveredMechanism(Refusal):
    """The plan's mechanism costs more than the guarantee that the plan states."""

    code = ExitCode.ACCOUNTING_MISMATCH


class BadData(Refusal):
    """A table is missing, unreadable, or not what the plan says about it."""

    code = ExitCode.BAD_DATA
    may_pass = True


class ChangedData(BadData):
    """The tables' rows are no longer those that a run's earlier steps were drawn from."""

    may_pass = False


class BadModel(Refusal):
    """The pretrained model is missing, unreadable, or has a part that cannot be clipped."""

    code = ExitCode.BAD_MODEL
    may_pass = True


class JournalLost(Refusal):
    """What the run drew before cannot be told any more, or not be drawn again with its key."""

    code = ExitCode.JOURNAL_LOST


class BadCheckpoint(Refusal):
    """The checkpoint volume holds another run's state, or none that is whole."""

    code = ExitCode.BAD_CHECKPOINT


class StopRequested(Exception):
    """The run was asked to stop, and did so between two steps; its text says what is left."""

    def __init__(
        self, left: str = "stopped on request; the steps taken are spent and no model was kept"
    ) -> None:
        super().__init__(left)


class Failure(Exception):
    """Base of what ends a run that was under way; its text holds no private value."""

    code: ClassVar[ExitCode] = ExitCode.CRASHED


class SavingFailed(Failure):
    """The trained model could not be written; the privacy is spent all the same."""


class CheckpointFailed(Failure):
    """The journal or a checkpoint could not be written; the steps journalled are spent."""


class PeerLost(Failure):
    """Another rank is gone or silent, or a newer attempt of this run has taken its place.

    This rank cannot go on either; all are to start again.
    """

    code = ExitCode.PEER_LOST
