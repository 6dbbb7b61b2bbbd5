"""What data *is*, whatever objects call it: the key of its account, and who may share its rows.

Two identities share rows unless they are provably apart or their owner declared it, since rows
that are under two accounts would be paid for by neither alone. Not seen from here, and so the
owner's to know: two claims on one volume, links, copies, and hub data sets that hold each other's
rows.
"""

import posixpath
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from urllib.parse import quote, unquote


@dataclass(frozen=True)
class DataIdentity:
    """The rows of a table.

    Attributes:
        base: the file, folder or hub split, as a URI without `?`.
        column: the column that the rows are chosen by; None for all rows.
        values: its values; empty for all rows.
    """

    base: str
    column: str | None = None
    values: frozenset[str] = frozenset()

    def __str__(self) -> str:
        """The account's name: readable, and the same for the same rows.

        >>> str(DataIdentity("claim://vault/data/reviews.csv", "year", frozenset({"25", "24"})))
        'claim://vault/data/reviews.csv?year=24,25'
        """
        if self.column is None:
            return self.base
        values = ",".join(quote(value, safe="") for value in sorted(self.values))
        return f"{self.base}?{quote(self.column, safe='')}={values}"

    @classmethod
    def parse(cls, name: str) -> "DataIdentity":
        """The identity that an account's name stands for."""
        base, partitioned, query = name.partition("?")
        if not partitioned:
            return cls(base)
        column, _, values = query.partition("=")
        return cls(base, unquote(column), frozenset(map(unquote, values.split(","))))

    def shares_rows(self, other: "DataIdentity") -> bool:
        """Whether some row may belong to both."""
        if not within(self.base, other.base) and not within(other.base, self.base):
            return False
        if self.column is None or self.column != other.column:
            return True
        return not self.values.isdisjoint(other.values)

    def surely_shares_rows(self, other: "DataIdentity") -> bool:
        """Whether rows belong to both whatever anybody declares: all of a table holds its parts."""
        if self.base != other.base:
            return False
        if self.column is None or other.column is None:
            return True
        return self.column == other.column and not self.values.isdisjoint(other.values)


def within(path: str, folder: str) -> bool:
    """Whether a normal path is a folder, or below it.

    >>> within("/data/a/b", "/data/a"), within("/data/ab", "/data/a")
    (True, False)
    """
    return path == folder or path.startswith(f"{folder}/")


@dataclass
class TakenRows:
    """Identities that own their rows, and the search for one that may share rows with another.

    A search costs what one identity holds, not how many are taken: an owner may cut a table into
    thousands of partitions.
    """

    _owners: dict[str, dict[str | None, dict[str, list[DataIdentity]]]] = field(
        default_factory=dict
    )
    _below: dict[str, set[str]] = field(default_factory=dict)

    def take(self, identity: DataIdentity) -> None:
        """Add the owner of some rows."""
        if identity.base not in self._owners:
            for folder in _folders(identity.base):
                self._below.setdefault(folder, set()).add(identity.base)
        columns = self._owners.setdefault(identity.base, {})
        by_value = columns.setdefault(identity.column, {})
        for value in identity.values or {""}:
            by_value.setdefault(value, []).append(identity)

    def owner(
        self, identity: DataIdentity, apart: Set[DataIdentity] = frozenset()
    ) -> DataIdentity | None:
        """One that may share rows with `identity`, or None.

        Args:
            identity: whose rows are looked for.
            apart: owners that are declared to hold none of them.
        """
        return next((owner for owner in self._candidates(identity) if owner not in apart), None)

    def _candidates(self, identity: DataIdentity) -> Iterator[DataIdentity]:
        for base in (*_folders(identity.base), *self._below.get(identity.base, ())):
            for column, by_value in self._owners.get(base, {}).items():
                same = column is not None and column == identity.column
                for value in identity.values & by_value.keys() if same else by_value:
                    yield from by_value[value]


def _folders(base: str) -> Iterator[str]:
    """A base and the folders around it."""
    scheme, _, path = base.partition("://")
    while path not in ("", "/"):
        yield f"{scheme}://{path}"
        path = posixpath.dirname(path)
