"""The planner's memory: what did not change is planned once, what changed anew."""

import contextlib
from typing import Any

import pytest
from tests.builders import ABSENT, SETTINGS, Object, block, job, snapshot, with_accounts

from dpmoe_operator.control.access import Refusal
from dpmoe_operator.control.accounts import standings
from dpmoe_operator.control.planning import Planned, Planner
from dpmoe_operator.control.views import JobView


class Counting(Planner):
    def __init__(self) -> None:
        super().__init__(SETTINGS)
        self.fresh = 0

    def _fresh(self, job: Any, judged: Any, granted: Any) -> Planned | Refusal:
        self.fresh += 1
        return super()._fresh(job, judged, granted)


def test_unchanged_manifests_are_planned_once() -> None:
    planner, asked, reviews = Counting(), JobView.of(job()), block()
    ledger = with_accounts(reviews)
    judged = standings(snapshot([reviews], ledger=ledger))
    assert planner.plan(asked, judged) is planner.plan(asked, judged)
    touched = block(uid=reviews["metadata"]["uid"], status={"jobs": 1})
    planner.plan(asked, standings(snapshot([touched], ledger=ledger)))
    assert planner.fresh == 1


def test_refusals_are_remembered_and_raised_again() -> None:
    planner, asked = Counting(), JobView.of(job(namespace="strangers"))
    judged = standings(snapshot([block()]))
    for _ in range(2):
        with pytest.raises(Refusal, match="no access"):
            planner.plan(asked, judged)
    assert planner.fresh == 1


def changed_block(**change: Any) -> Object:
    return block(uid="b", **change)


CHANGES: dict[str, tuple[Object, list[Object]]] = {
    "the job": (job(uid="j", meta={"generation": 2}), [changed_block()]),
    "the block": (job(uid="j"), [changed_block(meta={"generation": 2}, access=[])]),
    "its labels": (job(uid="j"), [changed_block(meta={"labels": {"a": "b"}})]),
    "another block of that name": (job(uid="j"), [block(uid="c")]),
    "it is gone": (job(uid="j"), []),
    "it was retired by its account": (job(uid="j"), [changed_block(retired=True)]),
    "it became a duplicate": (
        job(uid="j"),
        [
            changed_block(),
            block(
                "first",
                dataset={"claim": {"claimName": "data", "path": "reviews.jsonl"}},
                meta={"creationTimestamp": "2000-01-01T00:00:00Z"},
            ),
        ],
    ),
}


@pytest.mark.parametrize(("asked", "blocks"), CHANGES.values(), ids=CHANGES.keys())
def test_what_changed_is_planned_anew(asked: Object, blocks: list[Object]) -> None:
    planner = Counting()
    planner.plan(JobView.of(job(uid="j")), standings(snapshot([changed_block()])))
    with contextlib.suppress(Refusal):
        planner.plan(JobView.of(asked), standings(snapshot(blocks)))
    assert planner.fresh == 2


def test_selecting_jobs_see_new_blocks() -> None:
    chosen = {"names": ABSENT, "selector": {"matchLabels": {"kind": "x"}}}
    planner, asked = Planner(SETTINGS), JobView.of(job(blocks=chosen))
    labelled = {"labels": {"kind": "x"}}
    first, second = block("a", meta=labelled), block("b", meta=labelled)
    assert len(planner.plan(asked, standings(snapshot([first]))).plan.blocks) == 1
    assert len(planner.plan(asked, standings(snapshot([first, second]))).plan.blocks) == 2


def test_jobs_that_are_gone_are_forgotten() -> None:
    planner, asked, judged = Counting(), JobView.of(job(uid="j")), standings(snapshot([block()]))
    planner.plan(asked, judged)
    planner.forget_all_but(["other"])
    planner.plan(asked, judged)
    planner.forget_all_but(["j"])
    planner.plan(asked, judged)
    assert planner.fresh == 2
