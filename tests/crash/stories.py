"""Whole stories, from the first manifest to the last status, to be disturbed at every call.

A story is told by what people and nodes do once something is true, never by counting rounds: it
means the same wherever an operator died and how often.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.builders import ABSENT, TEAM, UNITS, Object, block, job
from tests.crash.nodes import is_running
from tests.crash.world import World

from dpmoe_operator.ledger.account import Grant

STEPS = 4


@dataclass
class Stage:
    """A world, and who plays in it: uids by name."""

    world: World
    uids: dict[str, str] = field(default_factory=dict)

    def block(self, name: str, **spec: Any) -> None:
        """Apply a block that keeps one order, which makes numbers and rounds small."""
        spec = {"budget": {"epsilon": "3", "orders": ["8"]}} | spec
        self.uids[name] = self.world.apply(block(name, **spec))

    def job(self, name: str, *blocks: str, sigma: str = "5", **spec: Any) -> None:
        """Apply a job of a few steps over all units of some blocks."""
        fields: Object = {
            "blocks": {"names": list(blocks)},
            "privacy": {"epsilon": ABSENT, "noiseMultiplier": sigma},
            "training": {"steps": STEPS, "logicalBatch": UNITS * len(blocks)},
        }
        self.uids[name] = self.world.apply(job(name, TEAM, **(fields | spec)))

    def delete(self, plural: str, name: str) -> None:
        """Delete what was applied under a name."""
        self.world.delete(plural, self.uids[name])

    def grant(self, name: str) -> Grant | None:
        """A job's grant, as the log has it."""
        return self.world.ledger.grants.get(self.uids[name])

    def granted(self, name: str) -> bool:
        """Whether a job has budget."""
        return self.grant(name) is not None

    def settled(self, name: str) -> bool:
        """Whether a job's grant is closed."""
        grant = self.grant(name)
        return grant is not None and grant.settled is not None

    def runs(self, name: str) -> bool:
        """Whether a job's trainer has taken all steps that it takes by itself."""
        nodes, uid = self.world.nodes, self.uids[name]
        patience = STEPS if nodes.patience is None else nodes.patience
        return any(map(is_running, nodes.pods())) and nodes.steps.get(uid) == patience

    def status(self, plural: str, name: str) -> Object:
        """What people read of an object."""
        status: Object = self.world.objects(plural)[self.uids[name]].get("status") or {}
        return status


When = Callable[[Stage], bool]
Do = Callable[[Stage], None]


@dataclass(frozen=True)
class Story:
    """What happens.

    Attributes:
        opening: what is there before the operator starts.
        turns: what is done once something is true, one after the other.
        settings: of the world.
    """

    name: str
    opening: Do
    turns: tuple[tuple[When, Do], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


def _one_job(stage: Stage, **spec: Any) -> None:
    stage.block("a")
    stage.job("train", "a", **spec)


def _that_waits(stage: Stage) -> None:
    stage.world.nodes.patience = 2
    _one_job(stage)


def _without_nodes(stage: Stage) -> None:
    stage.world.nodes.has_room = False
    _one_job(stage)


def _on_two_blocks(stage: Stage) -> None:
    stage.block("a")
    stage.block("b", budget={"epsilon": "4", "orders": ["4", "8.0"]})
    stage.job("train", "a", "b")


def _two_rivals(stage: Stage) -> None:
    """Together they do not fit; what the first gives back lets the second in."""
    stage.world.nodes.patience = 1
    stage.block("a")
    stage.job("first", "a", sigma="4", priority=1)
    stage.job("second", "a", sigma="4")


def _let_them_end(stage: Stage) -> None:
    stage.world.nodes.patience = None


def _no_end(_: Stage) -> None:
    """Nothing more is done: the story ends once this can be told."""


def _until(when: When) -> tuple[When, Do]:
    return when, _no_end


def _pod_is_waiting(stage: Stage) -> bool:
    return bool(stage.world.nodes.pods())


def _slow_down_news_of_pods(stage: Stage) -> None:
    stage.world.operators[-1].wire.slow = "/pods"


def _crash_pods(stage: Stage) -> None:
    for pod in stage.world.nodes.pods():
        stage.world.nodes.finish(pod, crash=True)


def _stop_trainers(stage: Stage) -> None:
    for pod in stage.world.nodes.pods():
        stage.world.nodes.finish(pod)


def _delete_workloads(stage: Stage) -> None:
    for workload in stage.world.workloads():
        stage.world.delete_workload(workload)


def _delete_pods(stage: Stage) -> None:
    for pod in stage.world.nodes.pods():
        stage.world.nodes.terminate(pod)


CORE = (
    Story(
        "it runs and completes",
        _one_job,
        (_until(lambda s: s.settled("train")),),
    ),
    Story(
        "it is deleted while its budget is reserved",
        _one_job,
        (
            (lambda s: s.granted("train"), lambda s: s.delete("dpmoejobs", "train")),
            _until(lambda s: s.settled("train")),
        ),
    ),
    Story(
        "it is deleted while it runs",
        _that_waits,
        (
            (lambda s: s.runs("train"), lambda s: s.delete("dpmoejobs", "train")),
            _until(lambda s: s.settled("train")),
        ),
    ),
    Story(
        "it pays from two blocks",
        _on_two_blocks,
        (_until(lambda s: s.settled("train")),),
    ),
    Story(
        "its block is deleted and applied again",
        _that_waits,
        (
            (lambda s: s.runs("train"), lambda s: s.delete("privateblocks", "a")),
            (lambda s: True, lambda s: _let_them_end(s)),
            (lambda s: s.settled("train"), lambda s: s.block("a")),
            _until(lambda s: s.status("privateblocks", "a").get("jobs") == 1),
        ),
    ),
    Story(
        "it never starts",
        _without_nodes,
        (
            (_pod_is_waiting, lambda s: s.delete("dpmoejobs", "train")),
            _until(lambda s: s.settled("train")),
        ),
    ),
)
"""The life of a job in its main courses: killed twice at every call."""

MORE = (
    Story(
        "one of two rivals is stopped",
        _two_rivals,
        (
            (lambda s: s.runs("first"), _stop_trainers),
            (lambda s: s.granted("second"), _let_them_end),
            _until(lambda s: s.settled("second")),
        ),
    ),
    Story(
        "its trainer is killed",
        _that_waits,
        (
            (lambda s: s.runs("train"), _crash_pods),
            _until(lambda s: s.settled("train")),
        ),
    ),
    Story(
        "its Kubernetes Job is deleted by hand",
        _that_waits,
        (
            (lambda s: s.runs("train"), _delete_workloads),
            _until(lambda s: s.settled("train")),
        ),
    ),
    Story(
        "its pod is deleted by hand",
        _that_waits,
        (
            (lambda s: s.runs("train"), _delete_pods),
            _until(lambda s: s.settled("train")),
        ),
    ),
    Story(
        "no news of its pods comes",
        _one_job,
        (
            (lambda s: s.granted("train"), _slow_down_news_of_pods),
            _until(lambda s: s.settled("train")),
        ),
    ),
    Story(
        "the log is shortened behind it",
        _one_job,
        (_until(lambda s: s.settled("train")),),
        {"checkpoint_entries": 2},
    ),
    Story(
        "its time to live ends",
        lambda s: _one_job(s, ttlSecondsAfterFinished=3),
        (_until(lambda s: not s.world.objects("dpmoejobs")),),
    ),
)
"""Other ends, and other actions of the operator's."""
