"""Whatever happens in whatever order: never over budget, never run unpaid, and in the end quiet.

A state machine plays people, Kubernetes and crashes against the real decisions. After every step
the ledger, the pods that run and the steps that they really took are compared.
"""

from datetime import timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from tests.builders import ABSENT, OTHER_TEAM, TEAM, UNITS, Object, block, job
from tests.control.cluster import Cluster
from tests.control.operator import Killed, Operator, settle_down

from dpmoe_operator.launch.launching import JOB_UID

BLOCKS: dict[str, Object] = {
    "a": {"budget": {"epsilon": "3", "orders": ["8"]}},
    "b": {"budget": {"epsilon": "3", "orders": ["4", "8.0"]}},
    "c": {
        "budget": {"epsilon": "4", "orders": ["8"]},
        "unlocking": {"kind": "time", "lifetimeSeconds": 60},
    },
}
ACCESS = [
    {
        "namespace": TEAM,
        "models": ["models"],
        "outputs": [{"claimName": "results"}],
        "checkpoints": {"claimName": "saved"},
    },
    {
        "namespace": OTHER_TEAM,
        "maxEpsilon": "2.5",
        "models": ["models"],
        "outputs": [{"claimName": "results"}],
    },
]


class ClusterUnderStress(RuleBasedStateMachine):
    """Jobs come and go, pods run and die, the operator is killed, its watches lag."""

    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster()
        for name in BLOCKS:
            self.apply_block(name)
        self.operator = Operator(self.cluster)
        self.run_round(None)
        self.run_round(None)
        self.made = 0

    def apply_block(self, name: str) -> None:
        self.made_blocks = getattr(self, "made_blocks", 0) + 1
        uid = f"{name}-{self.made_blocks}"
        self.cluster.apply(block(name, uid=uid, access=ACCESS, **BLOCKS[name]))

    # People

    @rule(
        target=jobs,
        names=st.sampled_from([["a"], ["b"], ["c"], ["a", "b"], ["b", "c"]]),
        sigma=st.sampled_from(["3.4", "5", "8"]),
        namespace=st.sampled_from([TEAM, OTHER_TEAM]),
        priority=st.integers(0, 1),
    )
    def apply_job(self, names: list[str], sigma: str, namespace: str, priority: int) -> str:
        self.made += 1
        spec: Object = {
            "blocks": {"names": names},
            "privacy": {"epsilon": ABSENT, "noiseMultiplier": sigma},
            "training": {"steps": 4, "logicalBatch": UNITS * len(names)},
            "priority": priority,
        }
        return self.cluster.apply(job("train", namespace, uid=f"job-{self.made}", **spec))

    @rule(uid=jobs)
    def delete_job(self, uid: str) -> None:
        self.cluster.delete("job", uid)

    @rule(uid=jobs, suspend=st.booleans())
    def suspend_job(self, uid: str, suspend: bool) -> None:
        if uid in self.cluster.jobs:
            self.cluster.edit(uid, suspend=suspend)

    @rule(name=st.sampled_from(sorted(BLOCKS)), opened=st.booleans())
    def change_access(self, name: str, opened: bool) -> None:
        for uid, manifest in self.cluster.blocks.items():
            if manifest["metadata"]["name"] == name:
                self.cluster.edit(uid, access=ACCESS if opened else [])

    @rule(name=st.sampled_from(sorted(BLOCKS)))
    def delete_or_apply_block(self, name: str) -> None:
        known = [u for u, b in self.cluster.blocks.items() if b["metadata"]["name"] == name]
        if known:
            self.cluster.delete("block", known[0])
        else:
            self.apply_block(name)

    @rule(often=st.integers(0, 5))
    def retire_block(self, often: int) -> None:
        """Block c alone, and not too early: nothing else happens on it after that."""
        for uid, manifest in self.cluster.blocks.items():
            if manifest["metadata"]["name"] == "c" and often == 0:
                self.cluster.edit(uid, retired=True)

    # People with rights in the data namespace

    @rule(number=st.integers(0, 3))
    def delete_workload(self, number: int) -> None:
        for uid in list(self.cluster.workloads)[number : number + 1]:
            self.cluster.delete("workload", uid)

    @rule(number=st.integers(0, 3))
    def suspend_workload(self, number: int) -> None:
        for uid in list(self.cluster.workloads)[number : number + 1]:
            self.cluster.suspend(uid)

    @rule(number=st.integers(0, 3))
    def resume_workload(self, number: int) -> None:
        """By hand, or by Kueue; also a Job that its operator gave up."""
        for uid in list(self.cluster.workloads)[number : number + 1]:
            job_uid = self.cluster.workloads[uid]["metadata"]["labels"][JOB_UID]
            grant = self.cluster.ledger.grants[job_uid]
            if grant.launched is not None and grant.settled is None:
                self.cluster.suspend(uid, suspend=False)

    @rule(number=st.integers(0, 3))
    def delete_pod(self, number: int) -> None:
        for uid in list(self.cluster.pods)[number : number + 1]:
            self.cluster.terminate(uid)

    # Kubernetes

    @rule()
    def job_controller(self) -> None:
        self.cluster.job_controller()

    @rule(number=st.integers(0, 3), times=st.integers(1, 3))
    def advance_pod(self, number: int, times: int) -> None:
        for uid in list(self.cluster.pods)[number : number + 1]:
            if "deletionTimestamp" not in self.cluster.pods[uid]["metadata"]:
                for _ in range(times):
                    self.cluster.advance(uid)

    @rule(number=st.integers(0, 3), steps=st.integers(1, 4))
    def train(self, number: int, steps: int) -> None:
        for uid in list(self.cluster.pods)[number : number + 1]:
            if self.cluster.is_running(uid):
                self.cluster.train(uid, steps)

    @rule(number=st.integers(0, 3), crash=st.booleans())
    def finish_pod(self, number: int, crash: bool) -> None:
        for uid in list(self.cluster.pods)[number : number + 1]:
            if self.cluster.is_running(uid):
                self.cluster.finish(uid, crash=crash)

    @rule()
    def kubelet(self) -> None:
        self.cluster.kubelet()

    @rule(refused=st.booleans())
    def refuse_pods(self, refused: bool) -> None:
        self.cluster.refuse_pods = refused

    @rule(number=st.integers(0, 3))
    def lose_pod(self, number: int) -> None:
        for uid in list(self.cluster.pods)[number : number + 1]:
            self.cluster.vanish(uid)

    @rule(seconds=st.sampled_from([1, 20]))
    def wait(self, seconds: int) -> None:
        self.cluster.now += timedelta(seconds=seconds)

    # The operator

    @rule(deaf=st.booleans())
    def hold_back_pods(self, deaf: bool) -> None:
        self.operator.deaf = deaf

    @rule()
    def lose_watch_of_pods(self) -> None:
        self.operator.list_pods()

    @rule(count=st.none() | st.integers(1, 4))
    def deliver(self, count: int | None) -> None:
        self.operator.deliver(count)

    @rule(fuse=st.none() | st.integers(0, 4))
    def run_round(self, fuse: int | None) -> None:
        self.operator.fuse = fuse
        try:
            self.operator.round()
        except Killed:
            self.operator.restart()
        self.operator.fuse = None

    @rule()
    def restart(self) -> None:
        self.operator.restart()

    @rule()
    def good_times(self) -> None:
        """Everything works for a while, so that jobs get far."""
        for _ in range(3):
            self.operator.deliver()
            self.operator.round()
            self.cluster.job_controller()
            for uid in list(self.cluster.pods):
                self.cluster.advance(uid)

    # What holds

    @invariant()
    def accounts_stay_within_capacity(self) -> None:
        for account in self.cluster.ledger.accounts.values():
            spent = zip(account.spending.total, account.capacity, strict=True)
            assert any(total <= capacity for total, capacity in spent), account

    @invariant()
    def one_account_for_each_data_set(self) -> None:
        assert len(self.cluster.ledger.accounts) <= len(BLOCKS)

    @invariant()
    def what_runs_is_paid_for(self) -> None:
        for uid, each in self.cluster.pods.items():
            if self.cluster.is_running(uid):
                grant = self.cluster.ledger.grants[each["metadata"]["labels"][JOB_UID]]
                assert grant.launched is not None
                assert grant.settled is None, (uid, grant.settled)

    @invariant()
    def nothing_is_refunded_that_was_spent(self) -> None:
        for uid, grant in self.cluster.ledger.grants.items():
            charged = grant.granted.steps if grant.settled is None else grant.settled.steps
            drawn = min(self.cluster.steps.get(uid, 0), grant.granted.steps)
            assert drawn <= charged, grant.settled

    def teardown(self) -> None:
        """Once nobody interferes any more, everything ends and is settled, and nothing moves."""
        self.cluster.now += timedelta(seconds=120)  # All budget is unlocked by then.
        self.cluster.refuse_pods = self.operator.deaf = False
        self.operator.deliver()
        settle_down(self.cluster, self.operator)
        for uid, grant in self.cluster.ledger.grants.items():
            assert grant.settled is not None, uid
        for account in self.cluster.ledger.accounts.values():
            assert not any(account.spending.reserved)
        sequence = self.cluster.ledger.sequence
        for _ in range(2):
            decision, actions = self.operator.round()
            assert (decision.records, actions) == ((), [])
            self.operator.restart()
            self.operator.round()
            self.operator.deliver()
        assert self.cluster.ledger.sequence == sequence
        self.what_runs_is_paid_for()
        self.nothing_is_refunded_that_was_spent()


TestClusterUnderStress = ClusterUnderStress.TestCase
TestClusterUnderStress.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, derandomize=True
)
