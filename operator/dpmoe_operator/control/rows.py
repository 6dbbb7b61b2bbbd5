"""Rows that may belong to two blocks: whoever has them keeps them, unless the owner says otherwise.

Two accounts over the same rows would let them be spent twice. So a block whose rows may be under
another account is refused, and so is one that evaluates on them: accounts of the ledger come first,
then live blocks by age. An owner may declare two blocks of a namespace disjoint where nothing shows
it. That is believed from either side, kept in the ledger for whoever audits it, and never covers
evaluation sets.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from datetime import datetime

from dpmoe_operator.api.identity import DataIdentity, TakenRows
from dpmoe_operator.control.views import BlockView, Snapshot
from dpmoe_operator.ledger.account import Account

Refused = tuple[str, str]
"""Reason and message of a block that may not be used."""


def age(block: BlockView) -> tuple[datetime, str]:
    """Sorts blocks, the oldest first."""
    return block.meta.created, block.meta.uid


def account_name(block: BlockView) -> str:
    """The account of a block that parses."""
    assert block.spec is not None
    return block.spec.dataset.account(block.meta.namespace)


class Declarations:
    """What unopened blocks declare disjoint from their rows, by the names of accounts.

    Attributes:
        accounts: that a block's `disjointFrom` stands for, by the block's own account.
        problems: declarations that cannot hold, by the uid of the block.
    """

    def __init__(self, snapshot: Snapshot, unopened: Mapping[str, BlockView]) -> None:
        self.accounts: dict[str, tuple[str, ...]] = {}
        self.problems: dict[str, Refused] = {}
        self._snapshot = snapshot
        self._opened = {
            (account.opened.block.namespace, account.opened.block.name): name
            for name, account in snapshot.ledger.accounts.items()
        }
        for own, block in unopened.items():
            assert block.spec is not None
            found = [(name, self._account(block, name)) for name in block.spec.disjoint_from]
            problem = next(self._problems(own, block.meta.namespace, found), None)
            if problem is not None:
                self.problems[block.meta.uid] = problem
            else:
                self.accounts[own] = tuple(dict.fromkeys(other for _, other in found if other))

    def _account(self, block: BlockView, name: str) -> str | None:
        """The data of the live block of that name, or of the last for which one was opened."""
        place = (block.meta.namespace, name)
        live = self._snapshot.blocks.get(place)
        if live is not None and live.spec is not None:
            return account_name(live)
        return self._opened.get(place)

    @staticmethod
    def _problems(
        own: str, namespace: str, found: Sequence[tuple[str, str | None]]
    ) -> Iterator[Refused]:
        mine = DataIdentity.parse(own)
        for name, other in found:
            if other is None:
                yield (
                    "InvalidSpec",
                    f"spec.disjointFrom: {name!r}: no PrivateBlock of namespace {namespace} has"
                    " that name, and no account was opened for one; apply that block first, or"
                    " apply this one without the name",
                )
            elif mine.surely_shares_rows(DataIdentity.parse(other)):
                yield (
                    "SharesRows",
                    f"spec.disjointFrom: {name!r}: stands for {other!r}, which holds rows of"
                    f" {own!r} whatever is declared; name other data in spec.dataset",
                )


def overlaps(
    holders: Mapping[str, BlockView],
    accounts: Mapping[str, Account],
    lost: Set[str],
    declared: Declarations,
) -> Iterator[tuple[str, Refused]]:
    """Refusals by the uid of the block: its rows, or those it evaluates on, belong to another.

    Args:
        holders: the live block of each account.
        accounts: of the ledger.
        lost: accounts of which the ledger knows too little: their rows are taken as well.
        declared: what the owners say.
    """
    taken, apart = TakenRows(), _apart(accounts, declared.accounts)
    for name in (*accounts, *sorted(lost - accounts.keys())):
        taken.take(DataIdentity.parse(name))
    for name, block in sorted(holders.items(), key=lambda item: age(item[1])):
        assert block.spec is not None
        if name in accounts or name in lost or block.spec.retired:
            continue
        identity = DataIdentity.parse(name)
        owner = taken.owner(identity, apart.get(name, frozenset()))
        if block.meta.uid in declared.problems:
            yield block.meta.uid, declared.problems[block.meta.uid]
        elif owner is not None:
            problem = (
                f"spec.dataset: {name!r}: may share rows with {str(owner)!r}, which has a budget of"
                " its own; name other data, partition both by the same column, or, where you know"
                " that they share none, say so in spec.disjointFrom"
            )
            yield block.meta.uid, ("SharesRows", problem)
        else:
            taken.take(identity)
    yield from _private_evaluations(holders, taken)


def _private_evaluations(
    holders: Mapping[str, BlockView], taken: TakenRows
) -> Iterator[tuple[str, Refused]]:
    for block in holders.values():
        assert block.spec is not None
        if block.spec.evaluation is None:
            continue
        scored = block.spec.evaluation.identity(block.meta.namespace)
        owner = taken.owner(scored)
        if owner is not None:
            problem = (
                f"spec.evaluation: {str(scored)!r}: may share rows with the private data"
                f" {str(owner)!r}; scores on it would be released uncounted, so name other data"
            )
            yield block.meta.uid, ("EvaluationIsPrivate", problem)


def _apart(
    accounts: Mapping[str, Account], declared: Mapping[str, Sequence[str]]
) -> dict[str, set[DataIdentity]]:
    """Which identities are declared to share no row with an account, from either side."""
    result: dict[str, set[DataIdentity]] = {}
    kept = {name: account.opened.disjoint_from for name, account in accounts.items()}
    for name, others in (*kept.items(), *declared.items()):
        for other in others:
            result.setdefault(name, set()).add(DataIdentity.parse(other))
            result.setdefault(other, set()).add(DataIdentity.parse(name))
    return result
