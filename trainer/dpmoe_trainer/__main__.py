"""`python -m dpmoe_trainer`: runs one TrainingPlan, or refuses it, and always reports.

Whatever happens to the run, the process ends with a report of the steps that were spent and with
an exit code of the contract. Its last line on stderr says the same in words. Neither holds
anything read from the data.
"""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from os import environ
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dpmoe_trainer.attempt import attempt, cost, deliver, reports, say
from dpmoe_trainer.contract import (
    TERMINATION_MESSAGE_BYTES,
    ExitCode,
    Outcome,
    TrainingPlan,
)
from dpmoe_trainer.environment import Settings, read_settings
from dpmoe_trainer.errors import BadPlan, Refusal
from dpmoe_trainer.journal import read_history
from dpmoe_trainer.quiet import silence_libraries
from dpmoe_trainer.report import build_report, encode_report
from dpmoe_trainer.supervise import STOP_SIGNALS, Supervisor, world_problem

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


def main(arguments: Sequence[str]) -> ExitCode:
    """Runs the trainer; returns its exit code."""
    stop = StopFlag()
    silence_libraries()
    try:
        settings = read_settings(arguments, environ)
    except BadPlan as error:
        return say(error.code, str(error))
    try:
        plan = read_plan(settings.plan)
    except BadPlan as error:
        # No plan, no report: whose would it be, and of what? Kubernetes shows the plain text.
        if settings.output is None and reports(settings):
            deliver(settings.report, str(error).encode()[:TERMINATION_MESSAGE_BYTES])
        return say(ExitCode.CRASHED if settings.failures else error.code, str(error))
    started_as_one = settings.worker is not None or plan.parallel.world == 1
    if started_as_one or world_problem(plan.parallel, settings.worker, settings.pod) is not None:
        return attempt(plan, settings, lambda: stop.raised)
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
            epsilon = cost(plan.privacy, past.drawn) if past.drawn else 0.0
            message = why or "rank 0 was killed; the steps are those of the journal"
            report = build_report(
                plan,
                Outcome.FAILED,
                past.drawn,
                epsilon,
                message=message,
                attempts=past.attempts,
            )
            deliver(settings.report, encode_report(report))
    return say(code, why)


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
