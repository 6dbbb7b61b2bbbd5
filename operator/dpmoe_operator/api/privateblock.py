"""PrivateBlock (`pb`): one partition of a private dataset, its privacy unit and its total budget.

The block's account in the ledger is named by what the data *is* (`DatasetSpec.account`), not by
what the object is called, so that deleting, renaming or re-applying a block never refills it.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dpmoe_operator.api.base import (
    DISTINCT,
    AbsolutePath,
    ApiModel,
    ColumnName,
    Conditions,
    DecimalString,
    DeltaString,
    DnsLabel,
    DnsName,
    EpsilonString,
    ImageName,
    MessageText,
    ReasonName,
    RelativePath,
    SpecError,
    StatusModel,
    Timestamp,
    Uri,
    decimal,
    exactly_one,
    list_map,
    list_set,
    positive,
    refuse_parent_steps,
)
from dpmoe_operator.api.identity import DataIdentity

KIND = "PrivateBlock"
PLURAL = "privateblocks"

MAX_ACCOUNT_NAME = 1024
"""Plans and ledger entries carry the account's name, escaped, once for every block."""

MAX_DISJOINT = 64
"""An account's opening names them all."""

HuggingFaceId = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$", max_length=128),
]

Revision = Annotated[str, Field(min_length=1, max_length=128)]


class ClaimSource(ApiModel):
    """A file on a PersistentVolumeClaim in the block's namespace."""

    claim_name: DnsName
    path: RelativePath


class HuggingFaceSource(ApiModel):
    """A dataset of the Hugging Face hub, by id."""

    id: HuggingFaceId
    revision: Revision | None = None
    split: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=64)] = "train"


class Partition(ApiModel):
    """The rows that belong to the block: those whose `column` holds one of `values`."""

    column: ColumnName
    values: Annotated[
        list[Annotated[str, Field(max_length=253)]],
        list_set(max_length=64, min_length=1),
        DISTINCT,
    ]


class Table(ApiModel):
    """A table of text, labelled where it has a label column.

    Attributes:
        text_column: the column of text; or else
        tokens_column: the column of the text's token ids, a list of integers in each row, by the
            tokenizer of the models that jobs train.
    """

    _place: ClassVar[str] = "spec.evaluation"

    path: AbsolutePath | None = None
    claim: ClaimSource | None = None
    hugging_face: HuggingFaceSource | None = None
    format: Literal["csv", "tsv", "jsonl", "parquet"] | None = None
    text_column: ColumnName | None = None
    tokens_column: ColumnName | None = None
    label_column: ColumnName | None = None
    partition: Partition | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        place = self._place
        exactly_one(
            place, {"path": self.path, "claim": self.claim, "huggingFace": self.hugging_face}
        )
        refuse_parent_steps(f"{place}.path", [self.path])
        refuse_parent_steps(f"{place}.claim.path", [self.claim.path if self.claim else None])
        if self.hugging_face is None and self.format is None:
            raise SpecError(f"{place}.format", "absent", "must be csv, tsv, jsonl or parquet")
        exactly_one(place, {"textColumn": self.text_column, "tokensColumn": self.tokens_column})
        if self.tokens_column is not None and self.format in ("csv", "tsv"):
            raise SpecError(
                f"{place}.format", self.format, "must be jsonl or parquet where tokensColumn is set"
            )
        return self

    def identity(self, namespace: str) -> DataIdentity:
        """What the data is.

        Format, columns' roles and revision are left out on purpose: reading the same rows another
        way is reading the same rows. The hub's ids don't tell upper from lower case.

        Args:
            namespace: the block's namespace, which scopes a volume claim.
        """
        if self.claim is not None:
            base = f"claim://{namespace}/{self.claim.claim_name}/{self.claim.path}"
        elif self.path is not None:
            base = f"path://{self.path}"
        else:
            assert self.hugging_face is not None
            base = f"huggingface://{self.hugging_face.id.lower()}@{self.hugging_face.split}"
        if self.partition is None:
            return DataIdentity(base)
        return DataIdentity(base, self.partition.column, frozenset(self.partition.values))

    def account(self, namespace: str) -> str:
        """The identity as a readable name: the key of the data's account in the ledger."""
        return str(self.identity(namespace))


class Dataset(Table):
    """The private table, with the number of its classes and its public size.

    Attributes:
        labels: classes are the integers from 0 to labels − 1.
        units: the owner's public count of privacy units. Sampling rates are computed from it; the
            guarantee holds whatever the true count is, since sampling is independent per unit.
    """

    _place: ClassVar[str] = "spec.dataset"

    labels: Annotated[int, Field(ge=2, le=1000)] = 2
    units: Annotated[int, Field(ge=1, le=10_000_000_000)]


class Unit(ApiModel):
    """What one person's privacy protects: one row, or all rows that share a column's value."""

    kind: Literal["example", "user"] = "example"
    column: ColumnName | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.kind == "user") != (self.column is not None):
            raise SpecError(
                "spec.unit.column", self.column, "must be set for kind user, and only for it"
            )
        return self


class Budget(ApiModel):
    """The total (ε, δ) that the block may ever leak, and how it is counted."""

    epsilon: EpsilonString
    delta: DeltaString
    orders: (
        Annotated[list[DecimalString], list_set(max_length=64, min_length=1), DISTINCT] | None
    ) = None
    conversion: Literal["classic", "tight"] = "tight"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        positive("spec.budget.epsilon", self.epsilon)
        positive("spec.budget.delta", self.delta)
        orders = [decimal(order) for order in self.orders or []]
        in_range = all(1 < order <= 1024 for order in orders)
        if not in_range or orders != sorted(set(orders)):
            raise SpecError("spec.budget.orders", self.orders, "must increase within (1, 1024]")
        return self


class Unlocking(ApiModel):
    """When the budget becomes available: at once, by arrivals (DPF-N) or by time (DPF-T).

    By time, evenly over the lifetime of the data, or in so many equal `steps`.
    """

    kind: Literal["immediate", "arrivals", "time"] = "immediate"
    arrivals: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    lifetime_seconds: Annotated[int, Field(ge=1, le=3_153_600_000)] | None = None
    steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.kind == "arrivals") != (self.arrivals is not None):
            raise SpecError(
                "spec.unlocking.arrivals",
                self.arrivals,
                "must be set for kind arrivals, and only there",
            )
        if (self.kind == "time") != (self.lifetime_seconds is not None):
            raise SpecError(
                "spec.unlocking.lifetimeSeconds",
                self.lifetime_seconds,
                "must be set for kind time, and only there",
            )
        if self.steps is not None and self.kind != "time":
            raise SpecError("spec.unlocking.steps", self.steps, "must be absent but for kind time")
        return self


class OutputGrant(ApiModel):
    """A place that results may go to: a claim in the block's namespace, or URIs with a prefix."""

    claim_name: DnsName | None = None
    uri_prefix: Uri | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        exactly_one(
            "spec.access.outputs", {"claimName": self.claim_name, "uriPrefix": self.uri_prefix}
        )
        if self.uri_prefix is not None and not self.uri_prefix.endswith("/"):
            raise SpecError("spec.access.outputs.uriPrefix", self.uri_prefix, "must end with '/'")
        refuse_parent_steps("spec.access.outputs.uriPrefix", [self.uri_prefix])
        return self


class CheckpointGrant(ApiModel):
    """A claim in the block's namespace for jobs' checkpoints.

    It is private: they hold the keys of the noise, so it may be read by nobody but the trainers.
    """

    claim_name: DnsName


class Access(ApiModel):
    """What one namespace may do with the block.

    Attributes:
        namespace: where the jobs live.
        max_epsilon: the most that the namespace's jobs may spend together, at the block's δ.
        images: trainer images that the owner trusts beside the operator's own.
        models: claims in the block's namespace from which models may be read.
        outputs: places that results may go to.
        checkpoints: where jobs keep what they need to go on after a restart; without it they are
            never restarted.
    """

    namespace: DnsLabel
    max_epsilon: EpsilonString | None = None
    images: Annotated[list[ImageName], list_set(max_length=32), DISTINCT] = []
    models: Annotated[list[DnsName], list_set(max_length=32), DISTINCT] = []
    outputs: Annotated[list[OutputGrant], Field(max_length=32)] = []
    checkpoints: CheckpointGrant | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        positive("spec.access.maxEpsilon", self.max_epsilon)
        opened = {*self.models, *(output.claim_name for output in self.outputs)}
        if self.checkpoints is not None and self.checkpoints.claim_name in opened:
            raise SpecError(
                "spec.access.checkpoints.claimName",
                self.checkpoints.claim_name,
                "must be a claim of its own, not one for models or outputs: checkpoints hold the"
                " keys of the noise",
            )
        return self


class PrivateBlockSpec(ApiModel):
    """What the data owner declares.

    Attributes:
        disjoint_from: names of blocks in the same namespace of which the owner declares that they
            hold none of this block's rows, though nothing shows it. Read when the block's account
            is opened, and kept in the ledger.
        retired: no grant any more, for ever; what runs goes on.
    """

    dataset: Dataset
    disjoint_from: Annotated[list[DnsName], list_set(max_length=MAX_DISJOINT), DISTINCT] = []
    evaluation: Table | None = None
    unit: Unit = Unit()
    budget: Budget
    unlocking: Unlocking = Unlocking()
    access: Annotated[list[Access], list_map("namespace", max_length=256)] = []
    retired: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        private = self.dataset.identity("")
        if self.evaluation is not None and self.evaluation.identity("").shares_rows(private):
            raise SpecError(
                "spec.evaluation",
                self.evaluation.account(""),
                "must share no row with the private table, since scores on it are released"
                " uncounted; name another file, or other values of the dataset's partition column",
            )
        name = self.dataset.account("n" * 63)
        if len(name) > MAX_ACCOUNT_NAME:
            raise SpecError(
                "spec.dataset.partition.values",
                f"{len(name)} characters with the data's name",
                f"must be at most {MAX_ACCOUNT_NAME}; name fewer or shorter values",
            )
        if decimal(self.budget.delta) * self.dataset.units >= 1:
            raise SpecError(
                "spec.budget.delta",
                self.budget.delta,
                f"must be below 1/units = 1/{self.dataset.units}",
            )
        namespaces = [access.namespace for access in self.access]
        if len(set(namespaces)) != len(namespaces):
            raise SpecError("spec.access", namespaces, "must name each namespace once")
        return self

    def access_of(self, namespace: str) -> Access | None:
        """What `namespace` may do, or None."""
        return next((a for a in self.access if a.namespace == namespace), None)


AmountText = Annotated[str, Field(max_length=32)]


class OrderStatus(StatusModel):
    """Amounts in ε at one RDP order."""

    order: DecimalString
    capacity: AmountText
    unlocked: AmountText
    reserved: AmountText
    consumed: AmountText


class Spender(StatusModel):
    """What one namespace's jobs reserved or consumed, as ε at the block's δ."""

    namespace: DnsLabel
    epsilon: AmountText
    jobs: Annotated[int, Field(ge=0)]


class PrivateBlockStatus(StatusModel):
    """A projection of the ledger for people; it may be deleted and is rebuilt at any time."""

    state: Literal["Ready", "Exhausted", "Retired", "Refused", "Frozen"] | None = None
    reason: ReasonName | None = None
    message: MessageText | None = None
    account: Annotated[str, Field(max_length=8192)] | None = None
    epsilon: AmountText | None = None
    consumed: AmountText | None = None
    reserved: AmountText | None = None
    available: AmountText | None = None
    used: AmountText | None = None
    waiting: Annotated[int, Field(ge=0)] | None = None
    jobs: Annotated[int, Field(ge=0)] | None = None
    next_unlock: Timestamp | None = None
    orders: Annotated[list[OrderStatus], list_map("order", max_length=64)] | None = None
    spenders: Annotated[list[Spender], list_map("namespace", max_length=32)] | None = None
    observed_generation: Annotated[int, Field(ge=0)] | None = None
    conditions: Conditions | None = None


IMMUTABLE = ("dataset", "disjointFrom", "unit", "budget")
"""Fields of the spec that may never change: the ledger's account stands on them."""

COLUMNS: list[dict[str, Any]] = [
    {"name": "Epsilon", "type": "string", "jsonPath": ".spec.budget.epsilon"},
    {"name": "Consumed", "type": "string", "jsonPath": ".status.consumed"},
    {"name": "Reserved", "type": "string", "jsonPath": ".status.reserved"},
    {"name": "Available", "type": "string", "jsonPath": ".status.available"},
    {"name": "Used", "type": "string", "jsonPath": ".status.used"},
    {"name": "Waiting", "type": "integer", "jsonPath": ".status.waiting"},
    {"name": "State", "type": "string", "jsonPath": ".status.state"},
    {"name": "Delta", "type": "string", "jsonPath": ".spec.budget.delta", "priority": 1},
    {"name": "Units", "type": "integer", "jsonPath": ".spec.dataset.units", "priority": 1},
    {"name": "Unlocking", "type": "string", "jsonPath": ".spec.unlocking.kind", "priority": 1},
    {"name": "Account", "type": "string", "jsonPath": ".status.account", "priority": 1},
    {"name": "Message", "type": "string", "jsonPath": ".status.message", "priority": 1},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
]
