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
    UtilityString,
)

KIND = "LedgerEntry"
PLURAL = "ledgerentries"

MAX_RECORDS = 10_000
MAX_STEPS = 10_000_000
MAX_PARTS = 1_000

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", max_length=64)]
AccountName = Annotated[str, Field(min_length=1, max_length=8192)]
Units = Annotated[int, Field(ge=-9 * 10**15, le=9 * 10**15)]
Curve = Annotated[list[Units], Field(min_length=1, max_length=64)]
Outcome = Annotated[str, Field(pattern=r"^[A-Z][A-Za-z]*$", max_length=64)]
EntryName = Annotated[str, Field(pattern=r"^entry-[0-9]{12}$", max_length=18)]
Total = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,29})$", max_length=30)]
"""A sum of many amounts, as a string: it may outgrow the 64 bits of the API server's integers."""

Totals = Annotated[list[Total], Field(min_length=1, max_length=64)]


class ObjectReference(ApiModel):
    """A namespaced object, as it was when the record was written."""

    namespace: DnsLabel
    name: DnsName
    uid: Annotated[str, Field(min_length=1, max_length=64)]


class AccountOpened(ApiModel):
    """A dataset partition got its budget. Happens once for each account, for ever.

    `disjoint_from` names the accounts that may seem to hold some of its rows, and of which the
    owner declared that they do not.
    """

    account: AccountName
    block: ObjectReference
    unit: Annotated[str, Field(max_length=300)]
    epsilon: EpsilonString
    delta: DeltaString
    conversion: Literal["classic", "tight"]
    orders: Annotated[list[DecimalString], Field(min_length=1, max_length=64)]
    capacity: Curve
    disjoint_from: Annotated[list[AccountName], Field(max_length=64)]


class AccountRetired(ApiModel):
    """The owner closed a partition: no grant on its account any more, for ever."""

    account: AccountName
    block: ObjectReference


class Charge(ApiModel):
    """An amount on one account, at each of its orders."""

    account: AccountName
    amounts: Curve


class Granted(ApiModel):
    """A job's whole plan is reserved on all its accounts.

    `utility` is there where the job is elastic: what the granted point is worth, of the whole job.
    """

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
    utility: UtilityString | None = None


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
    outcome: Outcome
    steps: Annotated[int, Field(ge=0, le=MAX_STEPS)]
    message: Annotated[str, Field(max_length=1024)]
    charges: Annotated[list[Charge], Field(min_length=1, max_length=256)]


class Balance(ApiModel):
    """What is reserved and consumed at each order, and by how many jobs."""

    reserved: Totals
    consumed: Totals
    jobs: Annotated[int, Field(ge=0, le=10**12)]


class AccountKept(ApiModel):
    """An account as a checkpoint keeps it."""

    opened: AccountOpened
    time: Timestamp
    balance: Balance
    retired: AccountRetired | None = None
    retirement_time: Timestamp | None = None


class ShareKept(ApiModel):
    """What the jobs of one namespace spent on one account, as a checkpoint keeps it."""

    account: AccountName
    namespace: DnsLabel
    balance: Balance


class GrantKept(ApiModel):
    """A grant as a checkpoint keeps it: open, or settled not long ago."""

    granted: Granted
    entry: EntryName
    time: Timestamp
    launched: Launched | None = None
    settled: Settled | None = None
    settlement_entry: EntryName | None = None
    settlement_time: Timestamp | None = None


class GrantClosed(ApiModel):
    """What stays known of a grant that was settled long ago: that there was one."""

    uid: Annotated[str, Field(min_length=1, max_length=64)]
    outcome: Outcome
    entry: EntryName
    time: Timestamp


class Checkpoint(ApiModel):
    """A part of the whole state, so that a reader may start here instead of at the first entry.

    The parts follow each other without any other entry between them.
    """

    part: Annotated[int, Field(ge=1, le=MAX_PARTS)]
    of: Annotated[int, Field(ge=1, le=MAX_PARTS)]
    accounts: Annotated[list[AccountKept], Field(max_length=MAX_RECORDS)]
    shares: Annotated[list[ShareKept], Field(max_length=MAX_RECORDS)]
    grants: Annotated[list[GrantKept], Field(max_length=MAX_RECORDS)]
    closed: Annotated[list[GrantClosed], Field(max_length=MAX_RECORDS)]


class Record(ApiModel):
    """One change of the accounts, or a part of a checkpoint: exactly one of the fields is set."""

    account_opened: AccountOpened | None = None
    account_retired: AccountRetired | None = None
    granted: Granted | None = None
    launched: Launched | None = None
    settled: Settled | None = None
    checkpoint: Checkpoint | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        changes = (  # Listed, since thousands of records are read at every start.
            self.account_opened,
            self.account_retired,
            self.granted,
            self.launched,
            self.settled,
            self.checkpoint,
        )
        if len(changes) - changes.count(None) != 1:
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
