"""`python -m dpmoe_trainer`: runs one TrainingPlan, or refuses it, and always reports.

Whatever happens to the run, the process ends with a report of the steps that were spent and with
an exit code of the contract. Its last line on stderr says the same in words. Neither holds
anything read from the data.
"""

import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from os import environ
from pathlib import Path
from types import FrameType

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
from dpmoe_trainer.errors import BadPlan, Refusal, SavingFailed, StopRequested
from dpmoe_trainer.progress import ProgressBoard, ProgressServer
from dpmoe_trainer.quiet import keep_offline, print_frames, silence_libraries
from dpmoe_trainer.report import build_report, describe, encode_report

FAULTS_SHOWN = 5
"""Of a plan with more faults than that, the first few are enough to start with."""


class StopFlag:
    """Set by SIGTERM and SIGINT; the loop looks at it between two steps."""

    def __init__(self) -> None:
        self.raised = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._raise)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = True


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
        if settings.output is None:
            _deliver(settings.report, str(error).encode()[:TERMINATION_MESSAGE_BYTES])
        return _end(error.code, str(error))
    return run(plan, settings, stop)


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
    """Trains, and reports however that ended."""
    privacy = plan.privacy
    board = ProgressBoard(privacy.steps, lambda steps: _cost(privacy, steps))
    evaluation: Evaluation | None = None
    output: str | None = None
    with ExitStack() as closing:
        try:
            if settings.progress_port is not None:
                closing.callback(ProgressServer(board, settings.progress_port).close)
            keep_offline(plan)
            # Imported late: with it come libraries that had to be silenced first.
            from dpmoe_trainer.train import train

            trained = train(plan, settings, board, lambda: stop.raised)
            evaluation, output = trained.evaluation, trained.output
            outcome, code, message = Outcome.COMPLETED, ExitCode.COMPLETED, ""
        except Refusal as error:
            outcome, code, message = Outcome.REFUSED, error.code, str(error)
        except StopRequested:
            outcome, code = Outcome.STOPPED, ExitCode.STOPPED
            message = "stopped on request; the steps taken are spent and no model was kept"
        except SavingFailed as error:
            outcome, code, message = Outcome.FAILED, ExitCode.CRASHED, str(error)
        except Exception as error:
            print_frames(error)
            outcome, code, message = Outcome.FAILED, ExitCode.CRASHED, describe(error)
        spent = board.epsilon()
        report = build_report(plan, outcome, board.drawn, spent, evaluation, output, message)
        delivered = _deliver(settings.report, encode_report(report))
    summary = f"{outcome}: {board.drawn} of {privacy.steps} steps, ε {spent:.3g} spent"
    if evaluation is not None:
        summary += (
            f", accuracy {evaluation.accuracy:.1%} "
            f"(largest class {evaluation.majority_share:.1%}, {evaluation.examples} examples)"
        )
    return _end(code if delivered else ExitCode.CRASHED, f"{summary}\n{message}".strip())


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
    print(message, file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
