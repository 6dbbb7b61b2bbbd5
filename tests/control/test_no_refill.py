"""Every way to get a spent budget back: none of them gives anything.

The block's budget is spent by two jobs. Then somebody tries something, and asks again.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
from tests.builders import NOW, Object, block, merged
from tests.control.cluster import Cluster
from tests.control.operator import Operator, settle_down
from tests.control.stages import ROOM_FOR_TWO, cheap

from dpmoe_operator.control.times import format_time

ACCOUNT = "claim://vault/data/reviews.jsonl"
SAME = {"claim": {"claimName": "data", "path": "reviews.jsonl"}}
PART = SAME | {"partition": {"column": "year", "values": ["2024"]}}
LARGE = {"epsilon": "99"}

Attempt = Callable[[Cluster], str]
"""Does something, and returns the name of the block to ask for."""

ATTEMPTS: dict[str, Attempt] = {}


def attempt(name: str) -> Callable[[Attempt], Attempt]:
    def register(function: Attempt) -> Attempt:
        ATTEMPTS[name] = function
        return function

    return register


def again(cluster: Cluster, name: str = "reviews", **spec: Any) -> str:
    """Apply a block over the same data, as a new object, now."""
    values: Object = {"budget": ROOM_FOR_TWO, "dataset": SAME} | spec
    created = {"creationTimestamp": format_time(NOW)}
    cluster.apply(block(name, uid=f"{name}-again", meta=created, **values))
    return name


@attempt("nothing at all")
def _(cluster: Cluster) -> str:
    return "reviews"


@attempt("delete and apply again")
def _(cluster: Cluster) -> str:
    cluster.delete("block", "b")
    return again(cluster)


@attempt("delete, wait for the operator, and apply again")
def _(cluster: Cluster) -> str:
    cluster.delete("block", "b")
    settle_down(cluster, Operator(cluster))
    return again(cluster)


@attempt("rename")
def _(cluster: Cluster) -> str:
    cluster.delete("block", "b")
    return again(cluster, "fresh")


@attempt("second block over the same data")
def _(cluster: Cluster) -> str:
    return again(cluster, "second")


@attempt("second block that claims to be older")
def _(cluster: Cluster) -> str:
    cluster.apply(
        block(
            "older",
            uid="o",
            dataset=SAME,
            budget=ROOM_FOR_TWO,
            meta={"creationTimestamp": "2000-01-01T00:00:00Z"},
        )
    )
    return "older"


@attempt("same data read another way")
def _(cluster: Cluster) -> str:
    cluster.delete("block", "b")
    other = SAME | {"format": "csv", "textColumn": "t", "labelColumn": "l", "units": 9999}
    return again(cluster, dataset=other)


@attempt("raise the budget in place, without CEL")
def _(cluster: Cluster) -> str:
    cluster.edit("b", budget=LARGE)
    return "reviews"


@attempt("apply again with a larger budget")
def _(cluster: Cluster) -> str:
    cluster.delete("block", "b")
    return again(cluster, budget=LARGE)


@attempt("apply again with more orders")
def _(cluster: Cluster) -> str:
    cluster.delete("block", "b")
    return again(cluster, budget={"epsilon": "3", "orders": ["4", "8", "16"]})


@attempt("apply again with another unit")
def _(cluster: Cluster) -> str:
    cluster.delete("block", "b")
    return again(cluster, unit={"kind": "user", "column": "author"})


@attempt("unlock at once what was unlocked")
def _(cluster: Cluster) -> str:
    cluster.edit("b", unlocking={"kind": "arrivals", "arrivals": 1})
    return "reviews"


@attempt("point the block at other data and back, without CEL")
def _(cluster: Cluster) -> str:
    spec = deepcopy(cluster.blocks["b"]["spec"])
    cluster.edit("b", dataset={"claim": {"path": "other.jsonl"}})
    settle_down(cluster, Operator(cluster))
    cluster.apply(cluster.blocks["b"] | {"spec": spec})
    return "reviews"


@attempt("cut the table into parts")
def _(cluster: Cluster) -> str:
    cluster.delete("block", "b")
    return again(cluster, "part", dataset=PART)


@attempt("cut the table into parts, and declare them disjoint from it")
def _(cluster: Cluster) -> str:
    cluster.delete("block", "b")
    return again(cluster, "part", dataset=PART, disjointFrom=["reviews"])


@attempt("declare the same data disjoint from itself")
def _(cluster: Cluster) -> str:
    cluster.delete("block", "b")
    return again(cluster, "fresh", disjointFrom=["reviews"])


@attempt("retire and apply again")
def _(cluster: Cluster) -> str:
    cluster.edit("b", retired=True)
    settle_down(cluster, Operator(cluster))
    cluster.delete("block", "b")
    return again(cluster)


@attempt("remove the statuses")
def _(cluster: Cluster) -> str:
    for each in (*cluster.blocks.values(), *cluster.jobs.values()):
        del each["status"]
    return "reviews"


@attempt("write a status that says that nothing was spent")
def _(cluster: Cluster) -> str:
    cluster.blocks["b"]["status"] |= {"jobs": 0, "consumed": "0", "available": "3", "orders": []}
    return "reviews"


def prune(cluster: Cluster) -> None:
    for kind in ("job", "block"):
        for uid in list(cluster.of(kind)):
            cluster.delete(kind, uid)


@attempt("apply again from Git, after a prune")
def _(cluster: Cluster) -> str:
    prune(cluster)
    settle_down(cluster, Operator(cluster))
    for number in range(2):
        cluster.apply(cheap(f"again-{number}"))
    return again(cluster)


@attempt("delete the custom resource definitions, and with them all objects but the ledger's")
def _(cluster: Cluster) -> str:
    """No event reaches the operator: it was away."""
    prune(cluster)
    for uid in list(cluster.workloads):
        cluster.delete("workload", uid)
    cluster.pending.clear()
    return again(cluster)


@attempt("delete the ledger's definition, and with it all entries")
def _(cluster: Cluster) -> str:
    cluster.lose_entries()
    return "reviews"


@attempt("take the ledger back to before the grants")
def _(cluster: Cluster) -> str:
    cluster.lose_entries(keep=1)
    return "reviews"


@pytest.fixture
def spent() -> Iterator[Cluster]:
    """A block whose budget two finished jobs have used up."""
    cluster = Cluster()
    cluster.apply(block(uid="b", budget=ROOM_FOR_TWO))
    for uid in ("j1", "j2"):
        cluster.apply(cheap(uid))
    settle_down(cluster, Operator(cluster))
    assert set(cluster.ledger.grants) == {"j1", "j2"}
    return cluster


@pytest.mark.parametrize("name", ATTEMPTS)
def test_spent_budget_never_comes_back(spent: Cluster, name: str) -> None:
    entries = deepcopy(spent.store.log)
    asked_for = ATTEMPTS[name](spent)
    spent.apply(merged(cheap("new"), {"spec": {"blocks": {"names": [asked_for]}}}))
    operator = Operator(spent)
    settle_down(spent, operator)
    operator.restart()
    settle_down(spent, operator)

    lost = not entries.keys() <= spent.store.log.keys()
    granted = set(spent.ledger.grants)
    assert granted == (set() if lost else {"j1", "j2"})
    assert spent.ledger.accounts.keys() <= {ACCOUNT, "claim://vault/data/other.jsonl"}
    if not lost:
        assert spent.ledger.accounts[ACCOUNT].spending.jobs == 2
    status = spent.jobs["new"]["status"]
    assert status["state"] == "Rejected", status
    assert status["message"]
