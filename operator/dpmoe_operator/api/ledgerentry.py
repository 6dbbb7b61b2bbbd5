"""LedgerEntry: one link of the append-only log in which all budget is accounted.

An entry's name is its dense sequence number, it carries its predecessor's SHA-256 and its own, and
its records commit together. Amounts are integers in 10⁻⁹ ε, one for each RDP order of the account.
The models have no defaults: what is hashed is exactly what is written.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dpmoe_operator.api.base import (
    ApiModel,
    DecimalString,
    DeltaString,
    DnsLabel,
    DnsName,
    EpsilonString,
    ImageName,
    SpecError,
    Timestamp,
)

KIND = "LedgerEntry"
PLURAL = "ledgerentries"

MAX_RECORDS = 10_000
MAX_STEPS = 10_000_000

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", max_length=64)]
AccountName = Annotated[str, Field(min_length=1, max_length=8192)]
Units = Annotated[int, Field(ge=-9 * 10**15, le=9 * 10**15)]
Curve = Annotated[list[Units], Field(min_length=1, max_length=64)]


class ObjectReference(ApiModel):
    """A namespaced object, as it was when the record was written."""

    namespace: DnsLabel
    name: DnsName
    uid: Annotated[str, Field(min_length=1, max_length=64)]


class AccountOpened(ApiModel):
    """A dataset partition got its budget. Happens once for each account, for ever."""

    account: AccountName
    block: ObjectReference
    unit: Annotated[str, Field(max_length=300)]
    epsilon: EpsilonString
    delta: DeltaString
    conversion: Literal["classic", "tight"]
    orders: Annotated[list[DecimalString], Field(min_length=1, max_length=64)]
    capacity: Curve


class Charge(ApiModel):
    """An amount on one account, at each of its orders."""

    account: AccountName
    amounts: Curve


class Granted(ApiModel):
    """A job's whole plan is reserved on all its accounts."""

    job: ObjectReference
    plan_digest: Sha256
    epsilon: Annotated[str, Field(max_length=32)]
    delta: DeltaString
    noise_multiplier: Annotated[str, Field(max_length=32)]
    sampling_rate: Annotated[str, Field(max_length=32)]
    clipping_norm: Annotated[str, Field(max_length=32)]
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    image: ImageName
    reports_prove: bool
    charges: Annotated[list[Charge], Field(min_length=1, max_length=256)]


class Launched(ApiModel):
    """A granted job's pods may run from now on.

    Written between the creation of the suspended Job and its release: a grant without this record
    has provably started nothing, and a grant with it is never launched a second time.
    """

    job: ObjectReference
    workload: ObjectReference


class Settled(ApiModel):
    """A grant ended: `charges` is consumed for ever, the rest of the reservation returns."""

    job: ObjectReference
    outcome: Annotated[str, Field(pattern=r"^[A-Z][A-Za-z]*$", max_length=64)]
    steps: Annotated[int, Field(ge=0, le=MAX_STEPS)]
    message: Annotated[str, Field(max_length=1024)]
    charges: Annotated[list[Charge], Field(min_length=1, max_length=256)]


class Record(ApiModel):
    """One change of the accounts: exactly one of the fields is set."""

    account_opened: AccountOpened | None = None
    granted: Granted | None = None
    launched: Launched | None = None
    settled: Settled | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        changes = (self.account_opened, self.granted, self.launched, self.settled)
        if sum(change is not None for change in changes) != 1:
            raise SpecError("spec.records", "a record", "must set exactly one of its fields")
        return self


class LedgerEntrySpec(ApiModel):
    """An entry of the log."""

    sequence: Annotated[int, Field(ge=0, le=999_999_999_999)]
    previous: Sha256
    time: Timestamp
    writer: Annotated[str, Field(min_length=1, max_length=253)]
    records: Annotated[list[Record], Field(min_length=1, max_length=MAX_RECORDS)]
    digest: Sha256


COLUMNS: list[dict[str, Any]] = [
    {"name": "Time", "type": "date", "jsonPath": ".spec.time"},
    {"name": "Writer", "type": "string", "jsonPath": ".spec.writer"},
    {"name": "Digest", "type": "string", "jsonPath": ".spec.digest"},
]
