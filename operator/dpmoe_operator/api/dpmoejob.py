"""DPMoEJob (`dpj`): the blocks that a team wants, the privacy it pays, the model it fine-tunes.

A job chooses placement and size of its pods from a closed list of fields. Command, volumes,
environment and sidecars are not among them: they would be a way to the data around the operator.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dpmoe_operator.api.base import (
    DISTINCT,
    AbsolutePath,
    ApiModel,
    Conditions,
    DecimalString,
    DeltaString,
    DnsLabel,
    DnsName,
    EpsilonString,
    ImageName,
    LabelKey,
    LabelValue,
    MessageText,
    ReasonName,
    RelativePath,
    SpecError,
    StatusModel,
    Timestamp,
    Uri,
    exactly_one,
    list_set,
    positive,
    refuse_parent_steps,
)
from dpmoe_operator.api.elastic import Elastic, Point
from dpmoe_operator.api.placement import Placement, Resources
from dpmoe_operator.api.privateblock import AmountText, HuggingFaceId, Revision
from dpmoe_operator.api.training import Clipping, Training

KIND = "DPMoEJob"
PLURAL = "dpmoejobs"

MAX_BLOCKS = 256
"""So many fit into a plan, and mostly into one record of the ledger."""


class BlockSelector(ApiModel):
    """Chooses blocks by their labels."""

    match_labels: Annotated[dict[LabelKey, LabelValue], Field(min_length=1, max_length=16)]


class BlockRequest(ApiModel):
    """The blocks that a job trains on: by name, or `count` of those that a selector matches.

    All of them live in one data namespace, where the trainer pods run. `pick` says which of more
    matching blocks are meant, until the job is granted: the first by name, the latest that were
    created, or any, spread evenly over jobs.
    """

    namespace: DnsLabel
    names: (
        Annotated[list[DnsName], list_set(max_length=MAX_BLOCKS, min_length=1), DISTINCT] | None
    ) = None
    selector: BlockSelector | None = None
    count: Annotated[int, Field(ge=1, le=MAX_BLOCKS)] | None = None
    pick: Literal["name", "latest", "any"] = "name"

    @property
    def most(self) -> int | None:
        """How many blocks the job asks for; None for all that match."""
        return self.count if self.names is None else len(self.names)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        exactly_one("spec.blocks", {"names": self.names, "selector": self.selector})
        if self.names is not None and self.count not in (None, len(self.names)):
            raise SpecError("spec.blocks.count", self.count, "must be absent where names are given")
        if self.pick != "name" and self.count is None:
            raise SpecError(
                "spec.blocks.pick", self.pick, "must be absent unless selector and count are set"
            )
        return self


class Privacy(ApiModel):
    """What the job pays. At least one of ε and σ; the operator calibrates the other."""

    epsilon: EpsilonString | None = None
    noise_multiplier: DecimalString | None = None
    delta: DeltaString
    clipping_norm: DecimalString = "1.0"
    clipping: Clipping = Clipping()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.epsilon is None and self.noise_multiplier is None:
            raise SpecError("spec.privacy.epsilon", "absent", "must be set, or noiseMultiplier")
        positive("spec.privacy.epsilon", self.epsilon)
        positive("spec.privacy.noiseMultiplier", self.noise_multiplier)
        positive("spec.privacy.delta", self.delta)
        positive("spec.privacy.clippingNorm", self.clipping_norm)
        return self


class ModelClaim(ApiModel):
    """A model folder on a claim in the blocks' namespace that their owner opened for models."""

    claim_name: DnsName
    path: RelativePath


class HuggingFaceModel(ApiModel):
    """A model of the Hugging Face hub, by id."""

    id: HuggingFaceId
    revision: Revision | None = None


class Upcycle(ApiModel):
    """Sparse upcycling of a dense model: chosen FFN layers become experts behind a router."""

    experts: Annotated[int, Field(ge=2, le=256)]
    top_k: Annotated[int, Field(ge=1, le=16)] = 2
    layers: Annotated[
        list[Annotated[int, Field(ge=0, le=1023)]],
        list_set(max_length=256, min_length=1),
        DISTINCT,
    ]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_k > self.experts:
            raise SpecError(
                "spec.model.upcycle.topK", self.top_k, f"must be at most {self.experts}"
            )
        return self


class Lora(ApiModel):
    """Low-rank adapters in place of the weights: fewer trained numbers get noise.

    Attributes:
        on: what gets adapters; a classifier's head is trained beside them.
        alpha: the additions are scaled by alpha/rank; twice the rank if absent.
    """

    rank: Annotated[int, Field(ge=1, le=1024)]
    alpha: DecimalString | None = None
    on: Annotated[
        list[Literal["attention", "experts"]], list_set(max_length=2, min_length=1), DISTINCT
    ] = ["attention", "experts"]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        positive("spec.model.lora.alpha", self.alpha)
        return self


class Model(ApiModel):
    """The pretrained model: safetensors and a config, no code of its own."""

    path: AbsolutePath | None = None
    claim: ModelClaim | None = None
    hugging_face: HuggingFaceModel | None = None
    upcycle: Upcycle | None = None
    trainable: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=253)]],
        list_set(max_length=64),
        DISTINCT,
    ] = []
    lora: Lora | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.lora is not None and self.trainable:
            raise SpecError(
                "spec.model.trainable",
                self.trainable,
                "must be absent where lora is set: its adapters and the head are what is trained",
            )
        exactly_one(
            "spec.model", {"path": self.path, "claim": self.claim, "huggingFace": self.hugging_face}
        )
        refuse_parent_steps("spec.model.path", [self.path])
        refuse_parent_steps("spec.model.claim.path", [self.claim.path if self.claim else None])
        return self


class Parallelism(ApiModel):
    """Pods, GPUs in each, and over how many ranks the experts are spread.

    Attributes:
        shard_dense: whether also what is no expert is sharded over the ranks.
        timeout_seconds: a rank that makes no progress for so long is taken for lost.
    """

    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    gpus_per_worker: Annotated[int, Field(ge=0, le=16)] = 0
    expert_parallel: Annotated[int, Field(ge=1, le=1024)] = 1
    shard_dense: bool = False
    timeout_seconds: Annotated[int, Field(ge=5, le=86_400)] = 600

    @property
    def processes(self) -> int:
        """Ranks of each pod: one a GPU, or one without."""
        return max(1, self.gpus_per_worker)

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.workers * self.processes

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.world % self.expert_parallel:
            raise SpecError(
                "spec.parallelism.expertParallel",
                self.expert_parallel,
                f"must divide the job's {self.world} ranks: workers {self.workers} times"
                f" {self.processes} for gpusPerWorker {self.gpus_per_worker}",
            )
        return self


class Checkpoint(ApiModel):
    """How often the run is saved, so that it can go on after a restart."""

    every_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 10


DEFAULT_RETRIES = 3


class OutputClaim(ApiModel):
    """A folder on a claim in the blocks' namespace that their owner opened for results."""

    claim_name: DnsName
    path: RelativePath


class Output(ApiModel):
    """Where the trained model goes."""

    claim: OutputClaim | None = None
    uri: Uri | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        exactly_one("spec.output", {"claim": self.claim, "uri": self.uri})
        refuse_parent_steps("spec.output.claim.path", [self.claim.path if self.claim else None])
        refuse_parent_steps("spec.output.uri", [self.uri])
        return self


class DPMoEJobSpec(ApiModel):
    """What a team asks for.

    Attributes:
        checkpoint: needs blocks that open a claim for it. Absent, the run is saved by default
            where they do.
        retries: how many failures of each rank's pod are tried again; needs checkpoints.
            `DEFAULT_RETRIES` if absent.
    """

    blocks: BlockRequest
    privacy: Privacy
    elastic: Elastic | None = None
    model: Model
    training: Training
    parallelism: Parallelism = Parallelism()
    output: Output
    checkpoint: Checkpoint | None = None
    retries: Annotated[int, Field(ge=0, le=100)] | None = None
    image: ImageName | None = None
    resources: Resources = Resources()
    placement: Placement = Placement()
    priority: Annotated[int, Field(ge=-1_000_000, le=1_000_000)] = 0
    weight: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    timeout_seconds: Annotated[int, Field(ge=1, le=315_360_000)] | None = None
    active_deadline_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = None
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=315_360_000)] | None = None
    suspend: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.elastic is not None:
            self.elastic.check(
                epsilon=self.privacy.epsilon,
                noise_multiplier=self.privacy.noise_multiplier,
                count=self.blocks.most,
            )
        return self

    def points(self) -> list[tuple[Self, str]]:
        """The job at each of its points and that point's utility, the best first.

        A job that is not elastic has one point, of utility 1.
        """
        if self.elastic is None:
            return [(self, "1")]
        points = self.elastic.points(self.privacy.epsilon, self.blocks.most)
        return [(self._at(point), point.utility) for point in points]

    def _at(self, point: Point) -> Self:
        privacy, blocks = self.privacy, self.blocks
        if point.epsilon is not None:
            privacy = privacy.model_copy(update={"epsilon": point.epsilon})
        if point.count is not None and blocks.names is not None:
            blocks = blocks.model_copy(update={"names": blocks.names[: point.count]})
        elif point.count is not None:
            blocks = blocks.model_copy(update={"count": point.count})
        return self.model_copy(update={"privacy": privacy, "blocks": blocks})


class EvaluationStatus(StatusModel):
    """Scores on the owner's releasable evaluation set; a language model's are of next tokens."""

    accuracy: AmountText
    majority_share: AmountText
    perplexity: AmountText | None = None
    examples: Annotated[int, Field(ge=1)]


class DPMoEJobStatus(StatusModel):
    """Where the job is, why it waits, what it cost."""

    state: (
        Literal["Pending", "Rejected", "Reserved", "Running", "Completed", "Failed", "Suspended"]
        | None
    ) = None
    reason: ReasonName | None = None
    message: MessageText | None = None
    epsilon: AmountText | None = None
    epsilon_spent: AmountText | None = None
    utility: AmountText | None = None
    noise_multiplier: AmountText | None = None
    sampling_rate: AmountText | None = None
    steps: Annotated[int, Field(ge=0)] | None = None
    steps_done: Annotated[int, Field(ge=0)] | None = None
    progress: AmountText | None = None
    eta: AmountText | None = None
    restarts: Annotated[int, Field(ge=0)] | None = None
    blocks: Annotated[list[DnsName], Field(max_length=MAX_BLOCKS)] | None = None
    grant_entry: Annotated[str, Field(max_length=64)] | None = None
    settlement_entry: Annotated[str, Field(max_length=64)] | None = None
    evaluation: EvaluationStatus | None = None
    output: Annotated[str, Field(max_length=1024)] | None = None
    start_time: Timestamp | None = None
    completion_time: Timestamp | None = None
    observed_generation: Annotated[int, Field(ge=0)] | None = None
    conditions: Conditions | None = None


MUTABLE = ("suspend", "priority", "ttlSecondsAfterFinished")
"""Fields of the spec that may change after creation; all others never do."""

COLUMNS: list[dict[str, Any]] = [
    {"name": "State", "type": "string", "jsonPath": ".status.state"},
    {"name": "Reason", "type": "string", "jsonPath": ".status.reason"},
    {"name": "Epsilon", "type": "string", "jsonPath": ".status.epsilon"},
    {"name": "Spent", "type": "string", "jsonPath": ".status.epsilonSpent"},
    {"name": "Progress", "type": "string", "jsonPath": ".status.progress"},
    {"name": "ETA", "type": "string", "jsonPath": ".status.eta"},
    {"name": "Accuracy", "type": "string", "jsonPath": ".status.evaluation.accuracy"},
    {"name": "Restarts", "type": "integer", "jsonPath": ".status.restarts", "priority": 1},
    {"name": "Utility", "type": "string", "jsonPath": ".status.utility", "priority": 1},
    {"name": "Blocks", "type": "string", "jsonPath": ".status.blocks", "priority": 1},
    {"name": "Output", "type": "string", "jsonPath": ".status.output", "priority": 1},
    {"name": "Message", "type": "string", "jsonPath": ".status.message", "priority": 1},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
]
