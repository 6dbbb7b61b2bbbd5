"""The run's answer to the operator: one TrainingReport that always fits a termination message.

Kubernetes keeps 4096 bytes and cuts the rest, and half a JSON document proves nothing, which would
cost the job the refund of what it did not spend. So the message gives way first, then the output's
name, which the plan holds anyway.
"""

import json
import traceback
from collections.abc import Sequence
from pathlib import Path

import dpmoe_trainer
from dpmoe_trainer.contract import (
    TERMINATION_MESSAGE_BYTES,
    Evaluation,
    Mechanism,
    Outcome,
    TrainingPlan,
    TrainingReport,
)

MESSAGE_CHARACTERS = 1024
"""The contract's bound on a message."""

_PACKAGE = Path(dpmoe_trainer.__file__).parent


def build_report(
    plan: TrainingPlan,
    outcome: Outcome,
    drawn: int,
    epsilon: float,
    evaluation: Evaluation | None = None,
    output: str | None = None,
    message: str = "",
    attempts: Sequence[str] = (),
) -> TrainingReport:
    """The report of a run that drew `drawn` samples, at a cost of `epsilon`."""
    mechanism = Mechanism(
        noise_multiplier=plan.privacy.noise_multiplier,
        sampling_rate=plan.privacy.sampling_rate,
        clipping_norm=plan.privacy.clipping_norm,
        steps=drawn,
    )
    return TrainingReport(
        job=plan.job,
        plan_digest=plan.digest(),
        outcome=outcome,
        mechanism=mechanism,
        epsilon=epsilon,
        evaluation=evaluation,
        output=output,
        attempts=tuple(attempts),
        message=_cut(message, MESSAGE_CHARACTERS),
    )


def encode_report(report: TrainingReport) -> bytes:
    """The report's JSON in at most `TERMINATION_MESSAGE_BYTES` bytes.

    A job with absurdly long names may not fit even so; its report is cut, proves nothing, and the
    operator charges the plan in full.
    """
    encoded = report.to_json().encode()
    if len(encoded) <= TERMINATION_MESSAGE_BYTES:
        return encoded
    bare = report.model_copy(update={"message": ""})
    if len(bare.to_json().encode()) > TERMINATION_MESSAGE_BYTES:
        bare = bare.model_copy(update={"output": None})
    room = TERMINATION_MESSAGE_BYTES - len(bare.to_json().encode())
    kept = report.message
    while kept and len(json.dumps(kept, ensure_ascii=False).encode()) - len('""') > room:
        kept = _cut(kept, len(kept) * 9 // 10)
    return bare.model_copy(update={"message": kept}).to_json().encode()[:TERMINATION_MESSAGE_BYTES]


def describe(error: BaseException) -> str:
    """A foreign error in words that hold no data: its type, and where in the trainer it arose.

    Its own text is left out, since libraries quote what they choke on.
    """
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    if not ours:
        return type(error).__name__
    place = Path(ours[-1].filename).relative_to(_PACKAGE)
    return f"{type(error).__name__} at {place}:{ours[-1].lineno}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(length - 1, 0)] + "…" * (length > 0)
