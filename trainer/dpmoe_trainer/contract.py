"""All that operator and trainer share: the plan that goes in, the report that comes out.

The operator writes a `TrainingPlan` before anything touches data, reserves its whole cost, and
mounts it read-only into the trainer pods. Rank 0 answers with a `TrainingReport` as the pod's
termination message. What holds:

- A plan pins the mechanism: noise multiplier σ, sampling rate q, number of steps, clipping norm C.
  The trainer runs that mechanism or refuses; it never derives one of them from the data.
- `TrainingPlan.digest()` names the plan in the ledger and in the report. A report that answers
  another plan proves nothing.
- Nothing here imports torch: the operator's image has none.
"""

import hashlib
import json
from enum import IntEnum, StrEnum
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

TERMINATION_MESSAGE_BYTES = 4096
"""What Kubernetes keeps of a termination message; a report must fit."""

VOLUMES = "/dpmoe"
"""Where a pod's claims are mounted, each at `/dpmoe/<use>/<claim>`."""

Name = Annotated[str, Field(min_length=1, max_length=253)]
PathString = Annotated[str, Field(min_length=1, max_length=1024)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ExitCode(IntEnum):
    """How the trainer's process ends; the operator never retries the codes from 3 to 9.

    Of the others, `PEER_LOST` is the end of a rank whose collective failed since another rank was
    gone, and `HUNG` that of a rank that made no progress for as long as the plan allows.
    """

    COMPLETED = 0
    CRASHED = 1
    BAD_PLAN = 3
    ACCOUNTING_MISMATCH = 4
    BUDGET_EXHAUSTED = 5
    BAD_DATA = 6
    BAD_MODEL = 7
    JOURNAL_LOST = 8
    BAD_CHECKPOINT = 9
    PEER_LOST = 10
    HUNG = 11
    STOPPED = 143


FINAL_CODES = tuple(code for code in ExitCode if 3 <= code <= 9)
"""Ends that another try would only repeat."""

OTHERS_CODES = (ExitCode.PEER_LOST, ExitCode.STOPPED)
"""Ends that another pod or somebody outside brought about: no failure of the pod itself."""


class Contract(BaseModel):
    """Base of all models here: immutable, camelCase on the wire, unknown fields are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=to_camel,
        populate_by_name=True,
        allow_inf_nan=False,
    )

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, absent fields left out."""
        content = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, in hex."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


class JobReference(Contract):
    """The DPMoEJob that a plan or a report belongs to."""

    namespace: Name
    name: Name
    uid: Name


class UnitPlan(Contract):
    """The privacy unit: one row, or all rows that share a value of `column`."""

    kind: Literal["example", "user"] = "example"
    column: Annotated[str, Field(max_length=253)] | None = None


class PartitionPlan(Contract):
    """Which rows of the file belong to the block: those whose `column` has one of `values`."""

    column: Name
    values: Annotated[tuple[str, ...], Field(min_length=1, max_length=64)]


class DataFormat(StrEnum):
    """File formats that `datasets` reads without running anybody's code."""

    CSV = "csv"
    TSV = "tsv"
    JSONL = "jsonl"
    PARQUET = "parquet"


class DataPlan(Contract):
    """One table of text, as the trainer finds it; without a label column, a language's text.

    Attributes:
        text_column: the column of text; or else
        tokens_column: the column of the text's token ids, a list of integers in each row.
    """

    path: PathString | None = None
    hugging_face: Name | None = None
    revision: Name | None = None
    split: Name | None = None
    format: DataFormat | None = None
    text_column: Name | None = None
    tokens_column: Name | None = None
    label_column: Name | None = None
    partition: PartitionPlan | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.hugging_face is None):
            raise ValueError("exactly one of path and huggingFace must be set")
        if self.path is not None and self.format is None:
            raise ValueError("format must be set where path is")
        return self

    @model_validator(mode="after")
    def _one_content(self) -> Self:
        if (self.text_column is None) == (self.tokens_column is None):
            raise ValueError("exactly one of textColumn and tokensColumn must be set")
        if self.tokens_column is not None and self.format in (DataFormat.CSV, DataFormat.TSV):
            raise ValueError(
                f"format must be jsonl or parquet where tokensColumn is set, {self.format} has no "
                f"lists"
            )
        return self


class BlockPlan(Contract):
    """One block that the job trains on. `units` is the owner's public count of privacy units."""

    namespace: Name
    name: Name
    account: PathString
    units: Annotated[int, Field(ge=1)]
    unit: UnitPlan
    data: DataPlan


class ClippingGroup(Contract):
    """Parameters that are clipped together: fnmatch patterns over their names.

    `weight` is the group's share of C², relative to the other groups'.
    """

    parameters: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=253)], ...],
        Field(min_length=1, max_length=64),
    ]
    weight: Annotated[float, Field(gt=0)] = 1.0


class ClippingPlan(Contract):
    """How a unit's gradient is brought to the clipping norm C; its sensitivity is C in every mode.

    Attributes:
        mode: `flat`, min(1, C/‖g‖); `per-group`, the same with a threshold for each group of
            parameters, whose squares sum to C²; `automatic`, C/(‖g‖ + γ).
        groups: of mode `per-group`; none means a group for each block of layers.
        gamma: γ of mode `automatic`.
    """

    mode: Literal["flat", "per-group", "automatic"]
    groups: Annotated[tuple[ClippingGroup, ...], Field(max_length=256)] = ()
    gamma: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.groups and self.mode != "per-group":
            raise ValueError("groups must be absent unless mode is per-group")
        if (self.gamma is not None) != (self.mode == "automatic"):
            raise ValueError("gamma must be set where mode is automatic, and only there")
        return self


class PrivacyPlan(Contract):
    """The mechanism, pinned: the Poisson-subsampled Gaussian, `steps` times.

    Attributes:
        epsilon: the (ε, δ) guarantee of the run by the operator's accountant.
        delta: its δ.
        noise_multiplier: σ; the noise on the clipped sum is N(0, (σC)² I).
        sampling_rate: q, the probability with which a unit is in a step's logical batch.
        steps: how often the mechanism runs, at most.
        clipping_norm: C, the L2 bound of one unit's contribution.
        clipping: how a unit's contribution is brought to C; absent for flat clipping.
        expected_batch: q × units, the public divisor of the noised sum.
        orders: RDP orders of the blocks that pay.
    """

    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    noise_multiplier: Annotated[float, Field(gt=0)]
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    steps: Annotated[int, Field(ge=1)]
    clipping_norm: Annotated[float, Field(gt=0)]
    expected_batch: Annotated[float, Field(gt=0)]
    orders: Annotated[tuple[float, ...], Field(min_length=1, max_length=64)]
    clipping: ClippingPlan | None = None


class UpcyclePlan(Contract):
    """Sparse upcycling: each chosen dense FFN becomes `experts` copies behind a router."""

    experts: Annotated[int, Field(ge=2, le=256)]
    top_k: Annotated[int, Field(ge=1, le=16)]
    layers: Annotated[tuple[int, ...], Field(min_length=1, max_length=256)]


class LoraPlan(Contract):
    """Low-rank adapters, which are trained in place of the weights and merged in at the end.

    Attributes:
        rank: of each adapter, and of each expert's.
        alpha: the additions are scaled by alpha/rank.
        attention: attention's linear layers get adapters.
        experts: fused expert weights get adapters.
    """

    rank: Annotated[int, Field(ge=1, le=1024)]
    alpha: Annotated[float, Field(gt=0)]
    attention: bool = True
    experts: bool = True

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if not (self.attention or self.experts):
            raise ValueError("one of attention and experts must be true")
        return self


class ModelPlan(Contract):
    """Where the pretrained model is and which of its parameters train.

    `labels` is the number of a classifier's classes; absent, a language model is trained.
    `trainable` holds fnmatch patterns over parameter names; empty means all parameters, or with
    `lora` the adapters and a classifier's head.
    """

    path: PathString | None = None
    hugging_face: Name | None = None
    revision: Name | None = None
    upcycle: UpcyclePlan | None = None
    labels: Annotated[int, Field(ge=2, le=1000)] | None = None
    trainable: Annotated[tuple[str, ...], Field(max_length=64)] = ()
    lora: LoraPlan | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.path is None) == (self.hugging_face is None):
            raise ValueError("exactly one of path and huggingFace must be set")
        if self.lora is not None and self.trainable:
            raise ValueError("trainable must be absent where lora is set")
        return self


class OptimizerName(StrEnum):
    """Optimisers of the noised gradient; all are post-processing of what was released."""

    SGD = "sgd"
    ADAMW = "adamw"
    ADAMBC = "adambc"


class OptimizerPlan(Contract):
    """The optimiser and its public settings."""

    name: OptimizerName = OptimizerName.ADAMW
    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0


class BalancingPlan(Contract):
    """What keeps the experts evenly used; it costs no privacy beyond the plan's mechanism.

    Attributes:
        method: `sequence`, a balancing loss over each row's own tokens; or `released-load`,
            steering by expert loads that are released with the gradients, in the same query.
        strength: of a loss, its factor; of a bias, how far a step moves it at most.
        through: of `released-load`, what is steered: the bias on the routers' choice, or a loss.
        load_share: of `released-load`, the loads' share of C².
    """

    method: Literal["sequence", "released-load"]
    strength: Annotated[float, Field(gt=0)]
    through: Literal["bias", "loss"] | None = None
    load_share: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        released = self.method == "released-load"
        if released != (self.through is not None) or released != (self.load_share is not None):
            raise ValueError(
                "through and loadShare must be set where method is released-load, and only there"
            )
        return self


Precision = Literal["float32", "bfloat16"]
"""No float16: it overflows, and models clamp that by the values of the whole batch."""


class TrainingSettings(Contract):
    """What shapes the run and costs no privacy.

    Attributes:
        method: the algorithm.
        optimizer: what makes updates of noised sums.
        max_tokens: where longer rows are cut.
        physical_batch: most rows that go through the model at once.
        precision: what the model's products are computed in; absent for float32. Weights, the
            optimiser's state, norms, clipped sums and noise are float32 in any case.
        balancing: what keeps the experts evenly used; absent for nothing.
    """

    method: Literal["dp-sgd"] = "dp-sgd"
    optimizer: OptimizerPlan
    max_tokens: Annotated[int, Field(ge=4, le=8192)] = 128
    physical_batch: Annotated[int, Field(ge=1, le=4096)] = 64
    precision: Precision | None = None
    balancing: BalancingPlan | None = None


class EvaluationPlan(Contract):
    """A set whose scores the owner declared releasable: public, or held out for that purpose."""

    data: DataPlan
    max_examples: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000


class ParallelPlan(Contract):
    """The processes of a run and how they share it; static, since all end where one is lost.

    With a checkpoint they then start again; without one, the run is over.

    The world has `workers` × `processes` ranks. Each computes samples of its own; `expert_parallel`
    ranks in a row hold all experts of a layer between them, and the world is a multiple of that.

    Attributes:
        workers: pods.
        processes: ranks of each pod, one a GPU.
        expert_parallel: ranks that share the experts.
        shard_dense: whether also what is no expert is sharded over the ranks (FSDP).
        timeout_seconds: a rank that makes no progress for so long is taken for lost.
    """

    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    expert_parallel: Annotated[int, Field(ge=1, le=1024)] = 1
    shard_dense: bool = False
    timeout_seconds: Annotated[int, Field(ge=5, le=86_400)] = 600

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.workers * self.processes

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.world % self.expert_parallel:
            raise ValueError(
                f"expertParallel must divide the {self.world} ranks (workers × processes), "
                f"{self.expert_parallel} does not"
            )
        return self


class CheckpointPlan(Contract):
    """Where the run keeps what it needs to go on after a restart: a folder of its own.

    The folder holds the run's secret key, so it lies beside the data. At the end all but its small
    journal is destroyed, which tells a late restart that the run is over.

    Attributes:
        path: the folder, on a volume that all ranks share.
        every_steps: steps between two checkpoints.
    """

    path: PathString
    every_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 10


class OutputPlan(Contract):
    """Where the trained model goes: a folder of an opened volume, or an opened URI."""

    path: PathString | None = None
    uri: PathString | None = None

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.path is None) == (self.uri is None):
            raise ValueError("exactly one of path and uri must be set")
        return self


class TrainingPlan(Contract):
    """Everything that a run may depend on, written before it starts."""

    version: Literal[1] = 1
    job: JobReference
    blocks: Annotated[tuple[BlockPlan, ...], Field(min_length=1, max_length=256)]
    privacy: PrivacyPlan
    model: ModelPlan
    training: TrainingSettings
    parallel: ParallelPlan = ParallelPlan()
    checkpoint: CheckpointPlan | None = None
    evaluation: EvaluationPlan | None = None
    output: OutputPlan | None = None

    def run_digest(self) -> str:
        """Names the run whatever its ranks: what a checkpoint must have been made by.

        The same run may go on with other ranks, so `parallel` is left out.
        """
        return self.model_copy(update={"parallel": ParallelPlan()}).digest()

    @model_validator(mode="after")
    def _labelled(self) -> Self:
        tables = [block.data for block in self.blocks]
        tables += [self.evaluation.data] if self.evaluation is not None else []
        if any((table.label_column is None) != (self.model.labels is None) for table in tables):
            raise ValueError(
                "labelColumn must be set in every table where model.labels is, and only there"
            )
        return self


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


PROGRESS_PORT = 8475
"""Port of rank 0's progress endpoint, unless the environment says otherwise."""


class Environment(StrEnum):
    """Names of the environment variables that a trainer process reads.

    `ROOT` is the folder that stands for `/` in the plan's absolute paths and in the other
    variables; it is unset in a container, and the local process runner sets it to the folder in
    which it lays out the pod's volumes.
    """

    ROOT = "DPMOE_ROOT"
    PLAN = "DPMOE_PLAN"
    TERMINATION_LOG = "DPMOE_TERMINATION_LOG"
    PROGRESS_PORT = "DPMOE_PROGRESS_PORT"
    POD_UID = "DPMOE_POD_UID"
    """Of the pod that the process runs in; unset outside Kubernetes."""
    FAILURES = "DPMOE_FAILURES"
    """How many pods of this index failed before this one, by Kubernetes' own count."""
    HEARTBEAT = "DPMOE_HEARTBEAT"
    """The pipe that a rank tells its supervisor through that it lives: a file descriptor."""
    DISRUPTIONS = "DPMOE_DISRUPTIONS"
    """How many were evicted, preempted or drained before this one, likewise; may be empty."""
    RESUMED = "DPMOE_RESUMED"
    """Set once rank 0 of the run was seen running: a suspended Job forgets its counts."""
