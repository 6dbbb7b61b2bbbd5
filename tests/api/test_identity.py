"""Account identity: the same data is the same account, and shared rows are found."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.builders import ABSENT, block_spec

from dpmoe_operator.api.base import parse
from dpmoe_operator.api.identity import DataIdentity, TakenRows
from dpmoe_operator.api.privateblock import PrivateBlockSpec

HUB: dict[str, Any] = {
    "claim": ABSENT,
    "format": ABSENT,
    "huggingFace": {"id": "owner/reviews"},
}


def account(namespace: str = "vault", **dataset: Any) -> str:
    return parse(PrivateBlockSpec, block_spec(dataset=dataset)).dataset.account(namespace)


SAME_DATA: list[dict[str, Any]] = [
    {"format": "csv"},
    {"textColumn": "other"},
    {"textColumn": ABSENT, "tokensColumn": "ids"},
    {"labelColumn": "other"},
    {"labels": 5},
    {"units": 77},
]


@pytest.mark.parametrize("dataset", SAME_DATA, ids=lambda d: next(iter(d)))
def test_reading_the_same_rows_another_way_is_the_same_account(dataset: dict[str, Any]) -> None:
    assert account(**dataset) == account() == "claim://vault/data/reviews.jsonl"


def test_order_of_partition_values_does_not_matter() -> None:
    first = account(partition={"column": "year", "values": ["2024", "2025"]})
    second = account(partition={"column": "year", "values": ["2025", "2024"]})
    assert first == second == "claim://vault/data/reviews.jsonl?year=2024,2025"


def test_hub_data_sets_are_named_by_id_and_split_alone() -> None:
    name = account(**HUB)
    assert name == "huggingface://owner/reviews@train"
    assert account(**HUB, textColumn="other") == name
    assert account(**{**HUB, "huggingFace": {"id": "Owner/Reviews", "revision": "v2"}}) == name
    assert account(**{**HUB, "huggingFace": {"id": "owner/reviews", "split": "test"}}) != name
    assert account("elsewhere", **HUB) == name


DIFFERENT_DATA: list[dict[str, Any]] = [
    {"claim": {"claimName": "data-2"}},
    {"claim": {"path": "other.jsonl"}},
    {"claim": ABSENT, "path": "/reviews.jsonl"},
    HUB,
    {"partition": {"column": "year", "values": ["2024"]}},
    {"partition": {"column": "year", "values": ["2024", "2025"]}},
    {"partition": {"column": "year", "values": ["2024,2025"]}},
    {"partition": {"column": "year=2024,2025", "values": [""]}},
    {"partition": {"column": "year", "values": ["2024", "2025", ""]}},
    {"partition": {"column": "month", "values": ["2024"]}},
]


def test_other_data_is_another_account() -> None:
    names = [account(**dataset) for dataset in DIFFERENT_DATA]
    assert len({account(), account("other"), *names}) == len(DIFFERENT_DATA) + 2


bases = st.sampled_from(
    ["claim://ns/c/a", "claim://ns/c/a/b", "claim://ns/c/ab", "claim://ns2/c/a", "path:///a"]
)
columns = st.none() | st.sampled_from(["year", "a=b", "?", "ü,"])


@st.composite
def identities(draw: st.DrawFn) -> DataIdentity:
    column = draw(columns)
    values = st.frozensets(st.sampled_from(["", "1", "2", "1,2", "%2C", "ä"]), min_size=1)
    return DataIdentity(draw(bases), column, draw(values) if column is not None else frozenset())


@given(identities())
def test_names_are_read_back(identity: DataIdentity) -> None:
    assert DataIdentity.parse(str(identity)) == identity


@given(identities(), identities())
def test_names_differ_exactly_where_identities_do(one: DataIdentity, other: DataIdentity) -> None:
    assert (str(one) == str(other)) == (one == other)


SHARING = [
    ("claim://n/c/a", "claim://n/c/a", True),
    ("claim://n/c/a", "claim://n/c/b", False),
    ("claim://n/c/a", "claim://n/c/a/b.csv", True),
    ("claim://n/c/a", "claim://n/c/ab", False),
    ("claim://n/c/a", "claim://n/c/a?y=1", True),
    ("claim://n/c/a?y=1", "claim://n/c/a?y=2", False),
    ("claim://n/c/a?y=1", "claim://n/c/a?y=1,2", True),
    ("claim://n/c/a?y=1", "claim://n/c/a?z=2", True),
    ("claim://n/c/a?y=1", "claim://n/c/a/b?y=2", False),
    ("claim://n/c/a", "claim://m/c/a", False),
    ("path:///data", "path:///data/x.csv", True),
    ("huggingface://a@train", "huggingface://a/b@train", False),
]


@pytest.mark.parametrize(("one", "other", "shared"), SHARING)
def test_shared_rows_are_found_unless_provably_apart(one: str, other: str, shared: bool) -> None:
    a, b = DataIdentity.parse(one), DataIdentity.parse(other)
    assert a.shares_rows(b) == b.shares_rows(a) == shared


SURELY = [
    ("claim://n/c/a", "claim://n/c/a", True),
    ("claim://n/c/a", "claim://n/c/a?y=1", True),
    ("claim://n/c/a?y=1", "claim://n/c/a?y=1,2", True),
    ("claim://n/c/a?y=1", "claim://n/c/a?y=2", False),
    ("claim://n/c/a?y=1", "claim://n/c/a?z=1", False),
    ("claim://n/c/a", "claim://n/c/a/b", False),
    ("claim://n/c/a", "claim://n/c/b", False),
]


@pytest.mark.parametrize(("one", "other", "shared"), SURELY)
def test_what_no_declaration_can_set_apart(one: str, other: str, shared: bool) -> None:
    a, b = DataIdentity.parse(one), DataIdentity.parse(other)
    assert a.surely_shares_rows(b) == b.surely_shares_rows(a) == shared


@given(identities(), identities())
def test_what_is_sure_is_possible(one: DataIdentity, other: DataIdentity) -> None:
    assert one.surely_shares_rows(one)
    assert one.shares_rows(other) or not one.surely_shares_rows(other)


@given(st.lists(identities(), max_size=6), identities(), st.sets(identities(), max_size=3))
def test_index_finds_what_comparing_with_all_finds(
    owners: list[DataIdentity], asked: DataIdentity, apart: set[DataIdentity]
) -> None:
    taken = TakenRows()
    for owner in owners:
        taken.take(owner)
    found = taken.owner(asked, apart)
    if found is None:
        assert not any(asked.shares_rows(owner) for owner in owners if owner not in apart)
    else:
        assert found in owners
        assert found not in apart
        assert asked.shares_rows(found)
