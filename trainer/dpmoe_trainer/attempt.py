"""One rank's attempt at a run: it trains, and rank 0 reports however that ended.

An attempt ends in one of the contract's exit codes. What earlier attempts drew counts in every
report, and where that cannot be told, all of the plan's steps do.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from dpmoe_trainer.contract import Evaluation, ExitCode, Outcome, PrivacyPlan, TrainingPlan
from dpmoe_trainer.environment import Settings
from dpmoe_trainer.errors import BadPlan, Failure, JournalLost, Refusal, StopRequested
from dpmoe_trainer.journal import Journal, open_journal, past_of
from dpmoe_trainer.progress import ProgressBoard, ProgressServer
from dpmoe_trainer.quiet import keep_offline, print_frames
from dpmoe_trainer.report import build_report, describe, encode_report
from dpmoe_trainer.supervise import heartbeat, world_problem


class CompletedBefore(Exception):
    """The run is over, and this rank, which ended just before it was told so, has nothing to do."""


@dataclass(frozen=True)
class Ending:
    """How an attempt ended.

    Attributes:
        outcome: for the report.
        code: for the process.
        message: what people should know, without a private value.
        evaluation: scores, if it came so far.
        output: where the model lies, likewise.
        refusal: what refused the run, if anything did.
    """

    outcome: Outcome
    code: ExitCode
    message: str = ""
    evaluation: Evaluation | None = None
    output: str | None = None
    refusal: Refusal | None = None


def attempt(plan: TrainingPlan, settings: Settings, stopping: Callable[[], bool]) -> ExitCode:
    """Trains, and has rank 0 report however that ended.

    Args:
        plan: what to run.
        settings: where its files are, and which rank this is.
        stopping: tells whether the run was asked to stop.
    """
    privacy = plan.privacy
    board = ProgressBoard(
        privacy.steps, lambda steps: cost(privacy, steps), beat=heartbeat(settings.heartbeat)
    )
    journal: Journal | None = None
    with ExitStack() as closing:

        def act() -> Ending:
            nonlocal journal
            journal, board.drawn = _begin(plan, settings)
            if journal is not None:
                closing.callback(journal.close)
            keep_offline(plan)
            # Of a run that goes on, ε is asked for at once. Its accountant is imported by then: a
            # second thread's import would meet half of what this one imports next.
            board.epsilon()
            if settings.progress_port is not None and settings.rank == 0:
                closing.callback(ProgressServer(board, settings.progress_port).close)
            return _train(plan, settings, board, stopping, journal)

        ending = _ending_of(act)
        ending, board.drawn = _with_the_past(ending, plan, settings, journal, board.drawn)
        if not reports(settings):
            said = f"rank {settings.rank}: {ending.outcome}: {ending.message}"
            return say(ending.code, said if ending.code else "")
        attempts = journal.history.attempts if journal is not None else ()
        spent = board.epsilon()
        report = build_report(
            plan,
            ending.outcome,
            board.drawn,
            spent,
            ending.evaluation,
            ending.output,
            ending.message,
            attempts,
        )
        delivered = deliver(settings.report, encode_report(report))
    summary = _summary(ending, f"{board.drawn} of {privacy.steps} steps, ε {spent:.3g} spent")
    return say(ending.code if delivered else ExitCode.CRASHED, summary)


def _ending_of(act: Callable[[], Ending]) -> Ending:
    """How it ended, whatever it raised."""
    try:
        return act()
    except CompletedBefore:
        return Ending(Outcome.COMPLETED, ExitCode.COMPLETED)
    except Refusal as error:
        return Ending(Outcome.REFUSED, error.code, str(error), refusal=error)
    except StopRequested as error:
        return Ending(Outcome.STOPPED, ExitCode.STOPPED, str(error))
    except Failure as error:
        return Ending(Outcome.FAILED, error.code, str(error))
    except Exception as error:
        print_frames(error)
        return Ending(Outcome.FAILED, ExitCode.CRASHED, describe(error))


def _with_the_past(
    ending: Ending, plan: TrainingPlan, settings: Settings, journal: Journal | None, drawn: int
) -> tuple[Ending, int]:
    """What earlier attempts make of an ending, and of the steps that were drawn."""
    if plan.checkpoint is None:
        return ending, drawn
    if _past_is_unknown(settings, journal, ending.refusal):
        drawn = plan.privacy.steps
    begun = drawn > 0 or settings.failures > 0
    if begun and ending.refusal is not None and ending.refusal.may_pass:
        # Earlier attempts came further; to refuse for good would lose what they spent.
        ending = replace(ending, outcome=Outcome.FAILED, code=ExitCode.CRASHED)
    if journal is not None:
        # What was journalled counts, also where the process ended before it drew.
        return ending, max(drawn, journal.history.drawn)
    # Without a journal, earlier attempts drew all as far as can be told.
    return ending, plan.privacy.steps if ending.outcome is Outcome.FAILED else drawn


def _past_is_unknown(settings: Settings, journal: Journal | None, refusal: Refusal | None) -> bool:
    """Whether earlier attempts may have drawn more than can be told: then all counts as drawn."""
    unread = refusal is not None and journal is None and settings.failures > 0
    return unread or isinstance(refusal, JournalLost)


def _summary(ending: Ending, steps: str) -> str:
    said = f"{ending.outcome}: {steps}"
    if (scores := ending.evaluation) is not None:
        said += (
            f", accuracy {scores.accuracy:.1%} "
            f"(largest class {scores.majority_share:.1%}, {scores.examples} examples)"
        )
    return f"{said}\n{ending.message}".strip()


def _begin(plan: TrainingPlan, settings: Settings) -> tuple[Journal | None, int]:
    """Journals this attempt before anything else happens, where the plan has a checkpoint.

    Returns:
        Rank 0's journal, and the steps that earlier attempts drew.
    """
    problem = world_problem(plan.parallel, settings.worker, settings.pod)
    if problem is not None:
        raise BadPlan(problem)
    if plan.checkpoint is None:
        return None, 0
    folder = settings.resolve(plan.checkpoint.path, "checkpoint.path")
    if settings.rank != 0:
        past = past_of(folder, plan.run_digest())
        if past.completed is not None:
            raise CompletedBefore
        return None, past.drawn
    uid = settings.pod_uid or str(uuid4())
    journal = open_journal(folder, plan.run_digest(), uid, settings.failures)
    return journal, journal.history.drawn


def _train(
    plan: TrainingPlan,
    settings: Settings,
    board: ProgressBoard,
    stopping: Callable[[], bool],
    journal: Journal | None,
) -> Ending:
    """Trains, unless the run is complete by its journal."""
    # Imported late: with it come libraries that had to be silenced first.
    if journal is not None and journal.history.completed is not None:
        from dpmoe_trainer.resume import completed_before

        evaluation, output = completed_before(plan, settings, journal)
        message = "completed by an earlier attempt"
    else:
        from dpmoe_trainer.train import train

        trained = train(plan, settings, board, stopping, journal)
        evaluation, output, message = trained.evaluation, trained.output, trained.notice
    return Ending(Outcome.COMPLETED, ExitCode.COMPLETED, message, evaluation, output)


def reports(settings: Settings) -> bool:
    """Whether this is rank 0's process, or in its place."""
    return settings.rank == 0 and (settings.pod is None or settings.pod.node_rank == 0)


def cost(privacy: PrivacyPlan, steps: int) -> float:
    """ε of so many steps, by the trainer's own accountant."""
    from dpmoe_trainer.dp.accounting import spent

    return spent(
        privacy.noise_multiplier, privacy.sampling_rate, steps, privacy.delta, privacy.orders
    )


def deliver(path: Path, content: bytes) -> bool:
    """Writes the report, or shows it on stderr where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        print(f"the report cannot be written to {path} ({error.strerror})", file=sys.stderr)
        print(content.decode(errors="replace"), file=sys.stderr)
        return False
    return True


def say(code: ExitCode, message: str) -> ExitCode:
    """The code, and the message to whoever looks on."""
    if message:
        print(message, file=sys.stderr, flush=True)
    return code
