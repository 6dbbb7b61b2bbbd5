"""Sealing: the chain of entries, and that no change of any of them goes unseen."""

import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.builders import commit, granted, launched, opened, settled, wrapped

from dpmoe_operator.ledger.entry import (
    GENESIS,
    MAX_ENTRY_BYTES,
    LedgerError,
    digest_of,
    entry_name,
    in_entries,
    open_entry,
    seal,
    to_manifest,
)
from dpmoe_operator.ledger.fold import LedgerState, fold

Path = tuple[str | int, ...]


def realistic_log() -> list[dict[str, Any]]:
    """Two accounts; three grants, of which one is settled in part, one launched, one waiting."""
    ledger = LedgerState()
    return [
        commit(ledger, opened("a", (100, 200)), opened("b", (50,))),
        commit(ledger, granted("job-1", {"a": (10, 20), "b": (5,)}), granted("job-2")),
        commit(ledger, launched("job-1"), launched("job-2", "workload-2")),
        commit(ledger, settled("job-1", {"a": (4, 8), "b": (2,)}, steps=40)),
        commit(ledger, granted("job-3", {"b": (45,)})),
    ]


LOG = realistic_log()


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from leaves(child, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from leaves(child, (*path, index))
    else:
        yield path, value


LEAVES = [
    (number, path, value)
    for number, manifest in enumerate(LOG)
    for path, value in leaves(manifest)
    if path[0] == "spec" or path == ("metadata", "name")
]


def changed(log: list[dict[str, Any]], number: int, path: Path, value: Any) -> list[dict[str, Any]]:
    log = deepcopy(log)
    node: Any = log[number]
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    return log


def test_realistic_log_holds() -> None:
    state = fold(LOG)
    assert state.sequence == 5
    assert state.head == LOG[-1]["spec"]["digest"]


values = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats()
    | st.text(max_size=20)
    | st.just("\ud800")
    | st.lists(st.integers(), max_size=2)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)


@given(st.sampled_from(LEAVES), values)
def test_any_other_value_anywhere_is_found(leaf: tuple[int, Path, Any], value: Any) -> None:
    number, path, old = leaf
    if type(value) is type(old) and value == old:
        return
    with pytest.raises(LedgerError) as error:
        fold(changed(LOG, number, path, value))
    assert error.value.entry == entry_name(number)


def nearly(value: Any) -> Any:
    """As little another value as can be."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return f"{value[:-1]}{'1' if value.endswith('0') else '0'}"


@pytest.mark.parametrize("number", range(len(LOG)))
def test_smallest_change_is_found(number: int) -> None:
    """In every leaf of every entry, the last included."""
    for place, path, value in LEAVES:
        if place == number:
            with pytest.raises(LedgerError):
                fold(changed(LOG, place, path, nearly(value)))


def containers(value: Any) -> Iterator[Any]:
    """Every object and list in a value, itself first."""
    if isinstance(value, dict | list):
        yield value
        for child in value.values() if isinstance(value, dict) else value:
            yield from containers(child)


@given(st.data())
def test_added_and_missing_fields_are_found(data: st.DataObject) -> None:
    log = deepcopy(LOG)
    entry = log[data.draw(st.integers(0, len(LOG) - 1))]
    target = data.draw(st.sampled_from(list(containers(entry["spec"]))))
    if isinstance(target, dict):
        if data.draw(st.booleans()):
            target["new"] = 1
        else:
            del target[data.draw(st.sampled_from(sorted(target)))]
    else:
        target.append(target[0] if target else "new")
    with pytest.raises(LedgerError):
        fold(log)


def test_resealing_a_changed_entry_breaks_the_next_one() -> None:
    log = changed(LOG, 1, ("spec", "records", 0, "granted", "steps"), 1)
    log[1]["spec"]["digest"] = digest_of(log[1]["spec"])
    with pytest.raises(LedgerError, match="entry-000000000002: does not follow its predecessor"):
        fold(log)


def test_order_of_keys_does_not_matter() -> None:
    """An API server may hand out a JSON object's fields in any order."""
    shuffled = json.loads(json.dumps(LOG, sort_keys=True))
    assert fold(shuffled).head == fold(LOG).head


@pytest.mark.parametrize("number", range(len(LOG) - 1))
def test_missing_entry_is_named(number: int) -> None:
    log = [manifest for n, manifest in enumerate(LOG) if n != number]
    with pytest.raises(LedgerError) as error:
        fold(log)
    assert error.value.entry == entry_name(number)
    assert f"missing: the next entry in the log is {entry_name(number + 1)}" in str(error.value)


@pytest.mark.parametrize("number", range(len(LOG) - 1))
def test_swapped_entries_are_found(number: int) -> None:
    log = [*LOG]
    log[number], log[number + 1] = log[number + 1], log[number]
    with pytest.raises(LedgerError, match=entry_name(number)):
        fold(log)
    renamed = deepcopy(log)
    for n in (number, number + 1):
        renamed[n]["metadata"]["name"] = entry_name(n)
    with pytest.raises(LedgerError, match="under another name"):
        fold(renamed)


@pytest.mark.parametrize("number", range(len(LOG)))
def test_duplicated_entry_is_found(number: int) -> None:
    log = [*LOG[: number + 1], *LOG[number:]]
    with pytest.raises(LedgerError, match=f"{entry_name(number + 1)}: missing"):
        fold(log)


BROKEN: list[dict[str, Any]] = [
    {},
    {"metadata": None},
    {"metadata": "entry-000000000000"},
    {"metadata": {"name": "entry-000000000000"}},
    {"metadata": {"name": "entry-000000000000"}, "spec": None},
    {"metadata": {"name": "entry-000000000000"}, "spec": []},
    {"metadata": {"name": "entry-000000000000"}, "spec": {}},
]


@pytest.mark.parametrize("manifest", BROKEN, ids=str)
def test_what_is_no_entry_is_an_error_of_the_ledger(manifest: dict[str, Any]) -> None:
    with pytest.raises(LedgerError, match="entry-000000000000"):
        open_entry(manifest, sequence=0, previous=GENESIS)


def test_sealed_entries_open() -> None:
    spec = seal(
        sequence=7,
        previous="ab" * 32,
        time="2030-01-01T00:00:00Z",
        writer="me",
        records=[wrapped(opened("konto ä"))],
    )
    entry = open_entry(to_manifest(spec, "ns"), sequence=7, previous="ab" * 32)
    assert entry.records[0].account_opened == opened("konto ä")
    assert to_manifest(spec, "ns")["metadata"] == {"name": "entry-000000000007", "namespace": "ns"}


def test_names_sort_like_numbers() -> None:
    names = [entry_name(n) for n in (0, 9, 10, 999, 10**11)]
    assert names == sorted(names)


def test_records_are_split_by_size_and_keep_their_order() -> None:
    big = {f"account-{i:04}-{'x' * 900}": (10**15,) * 60 for i in range(100)}
    records = [wrapped(granted(f"job-{i}", big)) for i in range(12)]
    batches = list(in_entries(records))
    assert [record for batch in batches for record in batch] == records
    sizes = [sum(len(record.model_dump_json().encode()) for record in batch) for batch in batches]
    assert len(batches) > 1
    # Full, but for what the next record would not have fitted into.
    one = sizes[0] // len(batches[0])
    assert all(MAX_ENTRY_BYTES - 2 * one < size for size in sizes[:-1])
    assert all(size < 1_000_000 for size in sizes)


def test_size_is_counted_in_bytes() -> None:
    """`é` is one character and two bytes: etcd counts bytes."""
    wide = {"é" * 1000: (1,) * 2}
    records = [wrapped(granted(f"job-{i}", wide)) for i in range(700)]
    for batch in in_entries(records):
        text = json.dumps([record.to_object() for record in batch], ensure_ascii=False)
        assert len(text.encode()) < 1_000_000


def test_records_are_split_by_number() -> None:
    records = [wrapped(launched(f"job-{i}")) for i in range(3)]
    assert [len(batch) for batch in in_entries(records)] == [3]
    many = [wrapped(launched("job-1"))] * 10_001
    assert max(len(batch) for batch in in_entries(many)) <= 10_000
    assert sum(len(batch) for batch in in_entries(many)) == 10_001


def test_no_records_make_no_entry() -> None:
    assert list(in_entries([])) == []
