"""What a run says of itself: how far it is, and at the end what it did."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from dpmoe_trainer.contract.base import Contract, Digest, JobReference, Name, PathString

TERMINATION_MESSAGE_BYTES = 4096
"""What Kubernetes keeps of a termination message; a report must fit."""


class Outcome(StrEnum):
    """How a run ended, by the trainer's own account."""

    COMPLETED = "Completed"
    STOPPED = "Stopped"
    REFUSED = "Refused"
    FAILED = "Failed"


class Mechanism(Contract):
    """The mechanism that really ran; `steps` counts every step whose sample was drawn."""

    noise_multiplier: Annotated[float, Field(gt=0)]
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    clipping_norm: Annotated[float, Field(gt=0)]
    steps: Annotated[int, Field(ge=0)]


class Evaluation(Contract):
    """Scores on the plan's releasable evaluation set, and the share of its largest class.

    A language model's classes are the next tokens, and `perplexity` is e to their mean loss.
    """

    examples: Annotated[int, Field(ge=1)]
    accuracy: Annotated[float, Field(ge=0, le=1)]
    majority_share: Annotated[float, Field(ge=0, le=1)]
    perplexity: Annotated[float, Field(ge=1)] | None = None


class TrainingReport(Contract):
    """What the trainer did. A claim: the operator settles by what it proves, not by what it says.

    `message` is for people and holds no private value: error texts of the trainer name fields and
    files, never content. `attempts` are the uids of the pods that ever ran rank 0 of the run, by
    the journal on its checkpoint volume: the steps of all of them are counted.
    """

    version: Literal[1] = 1
    job: JobReference
    plan_digest: Digest
    outcome: Outcome
    mechanism: Mechanism
    epsilon: Annotated[float, Field(ge=0)]
    evaluation: Evaluation | None = None
    output: PathString | None = None
    attempts: Annotated[tuple[Name, ...], Field(max_length=64)] = ()
    message: Annotated[str, Field(max_length=1024)] = ""


class Progress(Contract):
    """What rank 0 serves at `GET /progress`: public by the plan, nothing computed on the data."""

    step: Annotated[int, Field(ge=0)]
    steps: Annotated[int, Field(ge=1)]
    epsilon: Annotated[float, Field(ge=0)]
    steps_per_second: Annotated[float, Field(ge=0)] = 0.0
    phase: Literal["Loading", "Training", "Evaluating", "Saving", "Done"] = "Loading"
