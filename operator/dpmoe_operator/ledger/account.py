"""What the log adds up to: accounts with what is reserved and consumed, and grants."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import add, sub

from dpmoe_operator.api.ledgerentry import AccountOpened, AccountRetired, Granted, Launched, Settled

Amounts = tuple[int, ...]


def plus(a: Sequence[int], b: Sequence[int]) -> Amounts:
    """Order by order, a + b."""
    assert len(a) == len(b)
    return tuple(map(add, a, b))


def minus(a: Sequence[int], b: Sequence[int]) -> Amounts:
    """Order by order, a − b."""
    assert len(a) == len(b)
    return tuple(map(sub, a, b))


@dataclass(frozen=True)
class Spending:
    """Reserved and consumed amounts, in 10⁻⁹ ε at each order of the account."""

    reserved: Amounts
    consumed: Amounts
    jobs: int = 0

    @property
    def total(self) -> Amounts:
        """Everything that can no longer be promised to somebody else."""
        return plus(self.reserved, self.consumed)


@dataclass(frozen=True)
class Account:
    """One dataset partition's budget."""

    opened: AccountOpened
    time: str
    spending: Spending
    by_namespace: Mapping[str, Spending]
    retired: AccountRetired | None = None
    retirement_time: str | None = None

    @property
    def capacity(self) -> Amounts:
        """The total budget at each order, in 10⁻⁹ ε."""
        return tuple(self.opened.capacity)

    @property
    def zero(self) -> Amounts:
        """No amount, at each order."""
        return (0,) * len(self.opened.capacity)

    def of_namespace(self, namespace: str) -> Spending:
        """What the jobs of one namespace reserved and consumed here."""
        return self.by_namespace.get(namespace, Spending(self.zero, self.zero))

    def fits(self, amounts: Sequence[int]) -> bool:
        """Whether the filter still holds with `amounts` added: at some order, all fits."""
        sums = zip(self.spending.total, amounts, self.opened.capacity, strict=True)
        return any(spent + asked <= capacity for spent, asked, capacity in sums)


@dataclass(frozen=True)
class Grant:
    """One job's reservation, and how it ended."""

    granted: Granted
    entry: str
    time: str
    launched: Launched | None = None
    settled: Settled | None = None
    settlement_entry: str | None = None
    settlement_time: str | None = None

    @property
    def amounts(self) -> dict[str, Amounts]:
        """Reserved amounts by account."""
        return {charge.account: tuple(charge.amounts) for charge in self.granted.charges}
