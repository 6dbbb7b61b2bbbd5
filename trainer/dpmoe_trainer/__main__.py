"""`python -m dpmoe_trainer`: runs one TrainingPlan, or refuses it, and always reports.

Whatever happens to the run, the process ends with a report of the steps that were spent and with
an exit code of the contract. Its last line on stderr says the same in words. Neither holds
anything read from the data.
"""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from os import environ
from pathlib import Path
from types import FrameType
from typing import NoReturn
from uuid import uuid4

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dpmoe_trainer.contract import (
    TERMINATION_MESSAGE_BYTES,
    Evaluation,
    ExitCode,
    Outcome,
    PrivacyPlan,
    TrainingPlan,
)
from dpmoe_trainer.environment import Settings, read_settings
from dpmoe_trainer.errors import BadPlan, Failure, JournalLost, Refusal, StopRequested
from dpmoe_trainer.journal import Journal, open_journal, past_of, read_history
from dpmoe_trainer.progress import ProgressBoard, ProgressServer
from dpmoe_trainer.quiet import keep_offline, print_frames, silence_libraries
from dpmoe_trainer.report import build_report, describe, encode_report
from dpmoe_trainer.supervise import STOP_SIGNALS, Supervisor, heartbeat, world_problem

FAULTS_SHOWN = 5
"""Of a plan with more faults than that, the first few are enough to start with."""


class StopFlag:
    """Set by SIGTERM and SIGINT, also if they came before; the loop looks at it between steps."""

    def __init__(self) -> None:
        self.raised = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._raise)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = True


class CompletedBefore(Exception):
    """The run is over, and this rank, which ended just before it was told so, has nothing to do."""


def main(arguments: Sequence[str]) -> ExitCode:
    """Runs the trainer; returns its exit code."""
    stop = StopFlag()
    silence_libraries()
    try:
        settings = read_settings(arguments, environ)
    except BadPlan as error:
        return _end(error.code, str(error))
    try:
        plan = read_plan(settings.plan)
    except BadPlan as error:
        # No plan, no report: whose would it be, and of what? Kubernetes shows the plain text.
        if settings.output is None and _reports(settings):
            _deliver(settings.report, str(error).encode()[:TERMINATION_MESSAGE_BYTES])
        return _end(ExitCode.CRASHED if settings.failures else error.code, str(error))
    started_as_one = settings.worker is not None or plan.parallel.world == 1
    if started_as_one or _world_problem(plan, settings) is not None:
        return run(plan, settings, stop)
    return supervise(plan, settings, arguments, stop)


def read_plan(path: Path) -> TrainingPlan:
    """Reads the plan.

    Raises:
        BadPlan: there is none, or it is not a valid one; names the fields.
    """
    try:
        return TrainingPlan.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BadPlan(f"plan: {path} cannot be read ({error.strerror}); check the path") from error
    except ValidationError as error:
        faults = [_fault(fault) for fault in error.errors()[:FAULTS_SHOWN]]
        raise BadPlan(f"plan: {'; '.join(faults)}; correct {path}") from error


def _fault(fault: ErrorDetails) -> str:
    field = ".".join(str(part) for part in fault["loc"]) or "the document"
    given = fault["input"]
    value = f"{given!r:.80}: " if isinstance(given, str | int | float) else ""
    return f"{field}: {value}{fault['msg']}"


def run(plan: TrainingPlan, settings: Settings, stop: StopFlag) -> ExitCode:
    """Trains, and has rank 0 report however that ended."""
    privacy = plan.privacy
    board = ProgressBoard(
        privacy.steps, lambda steps: _cost(privacy, steps), beat=heartbeat(settings.heartbeat)
    )
    journal: Journal | None = None
    evaluation: Evaluation | None = None
    output: str | None = None
    with ExitStack() as closing:
        try:
            journal, board.drawn = _begin(plan, settings)
            if journal is not None:
                closing.callback(journal.close)
            keep_offline(plan)
            # Of a run that goes on, ε is asked for at once. Its accountant is imported by then: a
            # second thread's import would meet half of what this one imports next.
            board.epsilon()
            if settings.progress_port is not None and settings.rank == 0:
                closing.callback(ProgressServer(board, settings.progress_port).close)
            evaluation, output, message = _train(plan, settings, board, stop, journal)
            outcome, code = Outcome.COMPLETED, ExitCode.COMPLETED
        except CompletedBefore:
            return _end(ExitCode.COMPLETED, "")
        except Refusal as error:
            outcome, code, message = Outcome.REFUSED, error.code, str(error)
            if _past_is_unknown(plan, settings, journal, error):
                board.drawn = privacy.steps
            begun = plan.checkpoint is not None and (board.drawn > 0 or settings.failures > 0)
            if begun and error.may_pass:
                # Earlier attempts came further; to refuse for good would lose what they spent.
                outcome, code = Outcome.FAILED, ExitCode.CRASHED
        except StopRequested as error:
            outcome, code, message = Outcome.STOPPED, ExitCode.STOPPED, str(error)
        except Failure as error:
            outcome, code, message = Outcome.FAILED, error.code, str(error)
        except Exception as error:
            print_frames(error)
            outcome, code, message = Outcome.FAILED, ExitCode.CRASHED, describe(error)
        if plan.checkpoint is not None and journal is None and outcome is Outcome.FAILED:
            board.drawn = privacy.steps  # by earlier attempts, as far as can be told
        if not _reports(settings):
            return _end(code, f"rank {settings.rank}: {outcome}: {message}" if code else "")
        if journal is not None:
            # What was journalled counts, also where the process ended before it drew.
            board.drawn = max(board.drawn, journal.history.drawn)
        spent = board.epsilon()
        attempts = journal.history.attempts if journal is not None else ()
        report = build_report(
            plan, outcome, board.drawn, spent, evaluation, output, message, attempts
        )
        delivered = _deliver(settings.report, encode_report(report))
    summary = f"{outcome}: {board.drawn} of {privacy.steps} steps, ε {spent:.3g} spent"
    if evaluation is not None:
        summary += (
            f", accuracy {evaluation.accuracy:.1%} "
            f"(largest class {evaluation.majority_share:.1%}, {evaluation.examples} examples)"
        )
    return _end(code if delivered else ExitCode.CRASHED, f"{summary}\n{message}".strip())


def supervise(
    plan: TrainingPlan, settings: Settings, arguments: Sequence[str], stop: StopFlag
) -> ExitCode:
    """Runs this pod's ranks, one process each, and reports for rank 0 if it was killed."""
    supervisor = Supervisor(plan.parallel, settings.pod, arguments)
    code, why = supervisor.run(lambda: stop.raised)
    if supervisor.rank_0_was_killed() and plan.checkpoint is not None:
        folder = settings.resolve(plan.checkpoint.path, "checkpoint.path")
        with suppress(OSError, Refusal):  # a journal that cannot be read proves nothing
            past = read_history(folder, plan.run_digest())
            epsilon = _cost(plan.privacy, past.drawn) if past.drawn else 0.0
            message = why or "rank 0 was killed; the steps are those of the journal"
            report = build_report(
                plan,
                Outcome.FAILED,
                past.drawn,
                epsilon,
                message=message,
                attempts=past.attempts,
            )
            _deliver(settings.report, encode_report(report))
    return _end(code, why)


def _begin(plan: TrainingPlan, settings: Settings) -> tuple[Journal | None, int]:
    """Journals this attempt before anything else happens, where the plan has a checkpoint.

    Returns:
        Rank 0's journal, and the steps that earlier attempts drew.
    """
    problem = _world_problem(plan, settings)
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
    stop: StopFlag,
    journal: Journal | None,
) -> tuple[Evaluation | None, str | None, str]:
    """Trains, unless the run is complete by its journal: scores, output, and what to say."""
    # Imported late: with it come libraries that had to be silenced first.
    if journal is not None and journal.history.completed is not None:
        from dpmoe_trainer.resume import completed_before

        return *completed_before(plan, settings, journal), "completed by an earlier attempt"
    from dpmoe_trainer.train import train

    trained = train(plan, settings, board, lambda: stop.raised, journal)
    return trained.evaluation, trained.output, trained.notice


def _past_is_unknown(
    plan: TrainingPlan, settings: Settings, journal: Journal | None, error: Refusal
) -> bool:
    """Whether earlier attempts may have drawn more than can be told: then all counts as drawn."""
    unread = plan.checkpoint is not None and journal is None and settings.failures > 0
    return unread or isinstance(error, JournalLost)


def _world_problem(plan: TrainingPlan, settings: Settings) -> str | None:
    return world_problem(plan.parallel, settings.worker, settings.pod)


def _reports(settings: Settings) -> bool:
    """Whether this is rank 0's process, or in its place."""
    return settings.rank == 0 and (settings.pod is None or settings.pod.node_rank == 0)


def _cost(privacy: PrivacyPlan, steps: int) -> float:
    """ε of so many steps, by the trainer's own accountant."""
    from dpmoe_trainer.dp.accounting import spent

    return spent(
        privacy.noise_multiplier, privacy.sampling_rate, steps, privacy.delta, privacy.orders
    )


def _deliver(path: Path, content: bytes) -> bool:
    """Writes the report, or shows it on stderr where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        print(f"the report cannot be written to {path} ({error.strerror})", file=sys.stderr)
        print(content.decode(errors="replace"), file=sys.stderr)
        return False
    return True


def _end(code: ExitCode, message: str) -> ExitCode:
    if message:
        print(message, file=sys.stderr, flush=True)
    return code


def leave(code: ExitCode) -> NoReturn:
    """Ends the process with this code, without taking the interpreter down.

    A thread of gloo that lets go of its last tensor meanwhile would abort the process, and the code
    that the run ended with would be lost.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
