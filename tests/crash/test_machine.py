"""Whatever happens in whatever order: never over budget, never run unpaid, and in the end quiet.

A state machine plays people, nodes, time and the network against up to two real operators, each of
which may be killed at any of its calls, stand still, or see the cluster late. After every step the
log, the pods that run and the steps that they really took are compared.
"""

from typing import TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from tests.builders import ABSENT, OTHER_TEAM, TEAM, UNITS, Object, block, job
from tests.crash.nodes import is_running
from tests.crash.operators import Operator
from tests.crash.wire import Fault, met
from tests.crash.world import World

from dpmoe_operator.local.apiserver.deletion import Deletion

T = TypeVar("T")

ACCESS = [
    {"namespace": TEAM, "models": ["models"], "outputs": [{"claimName": "results"}]},
    {
        "namespace": OTHER_TEAM,
        "maxEpsilon": "2.5",
        "models": ["models"],
        "outputs": [{"claimName": "results"}],
    },
]
BLOCKS: dict[str, Object] = {
    "a": {"budget": {"epsilon": "3", "orders": ["8"]}},
    "b": {"budget": {"epsilon": "3", "orders": ["4", "8.0"]}},
    "c": {
        "budget": {"epsilon": "4", "orders": ["8"]},
        "unlocking": {"kind": "time", "lifetimeSeconds": 60},
    },
}
REFILLS: dict[str, Object] = {
    "a": {"budget": {"epsilon": "30", "orders": ["8"]}},
    "b-again": BLOCKS["b"] | {"dataset": {"claim": {"path": "b.jsonl"}}},
}
"""Manifests that would bring budget back: raised, and by another name for the same rows."""

LEAST_KILLS = 500
CRASHES = [fault for fault in Fault if fault.kills]
NUMBERS = st.integers(0, 3)
FAR = 12
"""So many calls from now a fault may come: about a round."""


def _pick(things: list[T], number: int) -> T | None:
    return things[number % len(things)] if things else None


class OperatorsUnderStress(RuleBasedStateMachine):
    """Jobs come and go, pods run and die, operators are killed, their views lag."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.applied = 0

    @initialize(ticks=st.integers(0, 6), patience=st.sampled_from([None, 2]))
    def begin(self, ticks: int, patience: int | None) -> None:
        """Three jobs ask for what suffices for two of them, and may run already."""
        self.world.nodes.patience = patience
        for name, spec in BLOCKS.items():
            self.world.apply(block(name, access=ACCESS, **spec))
        for names in (["a"], ["a", "b"], ["c"]):
            self.apply(names, sigma="5", namespace=TEAM)
        operator = self.world.start_operator()
        operator.turn()
        operator.turn()
        for _ in range(ticks):
            operator.turn()
            self.world.nodes.tick()
            self.world.settle()

    def apply(self, names: list[str], sigma: str, namespace: str, priority: int = 0) -> str:
        self.applied += 1
        spec: Object = {
            "blocks": {"names": names},
            "privacy": {"epsilon": ABSENT, "noiseMultiplier": sigma},
            "training": {"steps": 4, "logicalBatch": UNITS * len(names)},
            "priority": priority,
        }
        return self.world.apply(job(f"train-{self.applied}", namespace, **spec))

    def some_job(self, number: int) -> str | None:
        """One of the jobs that are there."""
        return _pick(sorted(self.world.objects("dpmoejobs")), number)

    def some_pod(self, number: int) -> Object | None:
        """One of the pods that are there."""
        return _pick(self.world.nodes.pods(), number)

    def some_workload(self, number: int) -> Object | None:
        """One of the Kubernetes Jobs that are there."""
        return _pick(self.world.workloads(), number)

    # People

    @rule(
        names=st.sampled_from([["a"], ["b"], ["c"], ["a", "b"], ["b", "c"]]),
        sigma=st.sampled_from(["3.4", "5", "8"]),
        namespace=st.sampled_from([TEAM, OTHER_TEAM]),
        priority=st.integers(0, 1),
    )
    def apply_job(self, names: list[str], sigma: str, namespace: str, priority: int) -> None:
        self.apply(names, sigma, namespace, priority)

    @rule(number=NUMBERS)
    def delete_job(self, number: int) -> None:
        if (uid := self.some_job(number)) is not None:
            self.world.delete("dpmoejobs", uid)

    @rule(number=NUMBERS, suspend=st.booleans())
    def suspend_job(self, number: int, suspend: bool) -> None:
        if (uid := self.some_job(number)) is not None:
            self.world.edit("dpmoejobs", uid, suspend=suspend)

    @rule(name=st.sampled_from(sorted(BLOCKS)), opened=st.booleans())
    def change_access(self, name: str, opened: bool) -> None:
        for uid in self.blocks_named(name):
            self.world.edit("privateblocks", uid, access=ACCESS if opened else [])

    @rule(name=st.sampled_from(sorted(BLOCKS)))
    def delete_or_apply_block(self, name: str) -> None:
        known = self.blocks_named(name)
        for uid in known:
            self.world.delete("privateblocks", uid)
        if not known:
            self.world.apply(block(name, access=ACCESS, **BLOCKS[name]))

    @rule(name=st.sampled_from(sorted(REFILLS)))
    def try_to_refill(self, name: str) -> None:
        for uid in self.blocks_named(name):
            self.world.delete("privateblocks", uid)
        self.world.apply(block(name, access=ACCESS, **REFILLS[name]))

    def blocks_named(self, name: str) -> list[str]:
        found = self.world.objects("privateblocks")
        return [uid for uid, each in found.items() if each["metadata"]["name"] == name]

    # People with rights in the data namespace

    @rule(number=NUMBERS, policy=st.sampled_from(["Background", "Foreground", "Orphan"]))
    def delete_workload(self, number: int, policy: str) -> None:
        if (workload := self.some_workload(number)) is not None:
            self.world.delete_workload(workload, policy)

    @rule(number=NUMBERS)
    def suspend_workload(self, number: int) -> None:
        if (workload := self.some_workload(number)) is not None:
            self.world.suspend_workload(workload)

    @rule(number=NUMBERS)
    def delete_pod(self, number: int) -> None:
        if (pod := self.some_pod(number)) is not None:
            self.world.nodes.delete(pod, Deletion("Background"))

    # Nodes

    @rule(number=NUMBERS)
    def advance_pod(self, number: int) -> None:
        pod = self.some_pod(number)
        if pod is not None and not is_running(pod) and "deletionTimestamp" not in pod["metadata"]:
            self.world.nodes.advance(pod)

    @rule(number=NUMBERS, steps=st.integers(1, 4))
    def train(self, number: int, steps: int) -> None:
        pod = self.some_pod(number)
        if pod is not None and is_running(pod):
            self.world.nodes.train(pod, steps)

    @rule(number=NUMBERS, crash=st.booleans())
    def finish_pod(self, number: int, crash: bool) -> None:
        pod = self.some_pod(number)
        if pod is not None and is_running(pod):
            self.world.nodes.finish(pod, crash=crash)

    @rule(number=NUMBERS)
    def lose_pod(self, number: int) -> None:
        if (pod := self.some_pod(number)) is not None:
            self.world.nodes.lose(pod)

    @rule()
    def kubelets(self) -> None:
        for pod in self.world.nodes.pods():
            if "deletionTimestamp" in pod["metadata"]:
                self.world.nodes.terminate(pod)

    # Time and network

    @rule(seconds=st.sampled_from([1, 20]))
    def wait(self, seconds: int) -> None:
        self.world.wait(seconds)

    @rule(second=st.booleans(), lags=st.booleans())
    def lag(self, second: bool, lags: bool) -> None:
        operator = self.operator(second)
        operator.wire.lagging = lags
        if not lags:
            operator.wire.catch_up()

    @rule(second=st.booleans(), count=st.integers(1, 4))
    def deliver(self, second: bool, count: int) -> None:
        self.operator(second).wire.deliver(count)

    @rule(second=st.booleans())
    def break_watches(self, second: bool) -> None:
        self.operator(second).wire.break_watches()

    @rule()
    def arrive_late(self) -> None:
        self.world.arrive_late()

    @rule(
        second=st.booleans(),
        fault=st.sampled_from([Fault.LOST, Fault.UNHEARD, Fault.ERROR, Fault.BUSY]),
        calls=st.integers(1, 12),
    )
    def fail_for_a_while(self, second: bool, fault: Fault, calls: int) -> None:
        wire = self.operator(second).wire
        wire.faults |= {len(wire.calls) + i: fault for i in range(calls)}

    # Operators

    def operator(self, second: bool) -> Operator:
        """One of two processes. The first is replaced when it is dead, the second too."""
        living = [each for each in self.world.operators if each.alive]
        while len(living) <= second:
            living.append(self.world.start_operator())
        return living[second]

    @rule(second=st.booleans())
    def run_round(self, second: bool) -> None:
        self.operator(second).turn()

    @rule(second=st.booleans(), fault=st.sampled_from(CRASHES), at=st.integers(0, FAR))
    def die_in_a_round(self, second: bool, fault: Fault, at: int) -> None:
        operator = self.operator(second)
        operator.wire.faults[len(operator.wire.calls) + at] = fault
        operator.turn()

    @rule(fault=st.sampled_from(CRASHES), at=st.integers(0, FAR))
    def die_at_the_start(self, fault: Fault, at: int) -> None:
        self.operator(False).kill()
        self.world.start_operator({at: fault}).turn()

    @rule(
        deaths=st.lists(
            st.tuples(st.sampled_from(CRASHES), st.integers(0, FAR)), min_size=3, max_size=8
        )
    )
    def crash_loop(self, deaths: list[tuple[Fault, int]]) -> None:
        """Each container dies at some call, and the next one goes on from there."""
        for fault, at in deaths:
            self.operator(False).kill()
            self.world.start_operator({at: fault}).turn()
            self.world.nodes.tick()
            self.world.settle()
            self.world.truth.check()

    @rule(second=st.booleans(), at=st.integers(0, FAR))
    def stand_still_in_a_round(self, second: bool, at: int) -> None:
        operator = self.operator(second)
        operator.wire.faults[len(operator.wire.calls) + at] = Fault.PAUSE
        operator.turn()

    @rule(second=st.booleans())
    def wake_up(self, second: bool) -> None:
        operator = self.operator(second)
        if not operator.works:
            operator.resume()

    @rule(ticks=st.integers(1, 5))
    def good_times(self, ticks: int) -> None:
        """Everything works for a while, so that jobs get far."""
        for _ in range(ticks):
            self.operator(False).turn()
            self.world.nodes.tick()
            self.world.settle()

    @rule(
        ticks=st.integers(2, 5),
        fault=st.sampled_from(Fault),
        at=st.integers(0, 5 * FAR),
        second=st.booleans(),
    )
    def nearly_good_times(self, ticks: int, fault: Fault, at: int, second: bool) -> None:
        """Everything works for a while, but at one call of one operator."""
        wire = self.operator(second).wire
        wire.faults[len(wire.calls) + at] = fault
        for _ in range(ticks):
            if second:
                self.operator(second).turn()
            self.good_times(1)

    # The log is taken back

    @rule(count=st.integers(1, 3))
    @precondition(lambda self: not self.world.truth.taken_back)
    def take_back_the_log(self, count: int) -> None:
        self.world.take_back(count)

    @rule()
    @precondition(lambda self: self.world.truth.taken_back)
    def recover_the_log(self) -> None:
        self.world.recover()

    # What holds

    @invariant()
    def all_rules_hold(self) -> None:
        self.world.settle()
        self.world.truth.check()

    @invariant()
    def one_account_for_each_data_set(self) -> None:
        assert len(self.world.ledger.accounts) <= len(BLOCKS)

    def teardown(self) -> None:
        """Once nobody interferes any more, everything ends and is settled, and nothing moves."""
        with self.world as world:
            if world.truth.taken_back:
                world.recover()
            for each in world.operators:
                if each.alive and not each.works:
                    each.resume()
                each.kill()
            world.arrive_late()
            world.delete_orphans()
            world.nodes.patience = None
            world.wait(120)  # All budget is unlocked by then.
            self.come_to_rest()
            for uid, grant in world.ledger.grants.items():
                assert grant.settled is not None, uid
            for account in world.ledger.accounts.values():
                assert not any(account.spending.reserved)
            world.truth.check_log()
            world.truth.check_statuses(world.objects("privateblocks"), world.objects("dpmoejobs"))
            world.operators[-1].kill()
            operator = world.start_operator()
            before = world.activity
            assert operator.turn()
            assert operator.turn()
            assert world.activity == before

    def come_to_rest(self) -> None:
        operator = self.world.start_operator()
        for _ in range(60):
            before = self.world.activity
            assert operator.turn()
            self.world.nodes.tick()
            self.world.wait(2)
            self.world.truth.check()
            if self.world.activity == before:
                return
        raise AssertionError("never quiet")


class TestOperatorsUnderStress(OperatorsUnderStress.TestCase):
    """Runs the machine, and counts at how many points it killed an operator."""

    settings = settings(max_examples=115, stateful_step_count=30, deadline=None, derandomize=True)

    def runTest(self) -> None:  # noqa: N802 (unittest's name)
        before = kills()
        super().runTest()
        assert kills() - before >= LEAST_KILLS


def kills() -> int:
    """How often operators were killed so far in this process."""
    return sum(count for fault, count in met.items() if fault.kills)
