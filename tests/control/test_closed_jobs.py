"""Jobs that were settled long ago: the ledger keeps little of them, and that is enough."""

from datetime import timedelta

import pytest
from tests.builders import NOW, SETTINGS, Object, block, run
from tests.control.cluster import Cluster
from tests.control.operator import Operator, settle_down
from tests.control.stages import cheap

from dpmoe_operator.control.actions import DeleteJob, Remove, SetStatus
from dpmoe_operator.control.decide import decide
from dpmoe_operator.control.times import parse_time
from dpmoe_operator.ledger.checkpoint import KEEP_WHOLE, checkpoint_records

LATER = NOW + KEEP_WHOLE + timedelta(minutes=10)


@pytest.fixture
def cluster() -> Cluster:
    """A block and one finished job."""
    result = Cluster()
    result.apply(block(uid="b"))
    return result


def finish(cluster: Cluster, asked: Object) -> Operator:
    """Run a job to its end, and let a checkpoint close its grant."""
    cluster.apply(asked)
    operator = Operator(cluster)
    settle_down(cluster, operator)
    cluster.now = LATER
    contents = operator.ledger.state.contents().shortened(LATER, set(cluster.jobs))
    for record in checkpoint_records(contents):
        run(operator.ledger.append([record], time=LATER.strftime("%Y-%m-%dT%H:%M:%S.%fZ")))
    assert list(operator.ledger.state.closed) == [asked["metadata"]["uid"]]
    assert operator.ledger.state.grants == {}
    return operator


def test_closed_job_is_left_as_it_is(cluster: Cluster) -> None:
    operator = finish(cluster, cheap())
    before = cluster.jobs["j"]["status"]
    decision, actions = operator.round()
    assert (decision.records, decision.plans, actions) == ((), {}, [])
    operator.restart()
    settle_down(cluster, operator)
    assert cluster.jobs["j"]["status"] == before
    assert before["epsilonSpent"]


def test_closed_job_without_its_status_gets_what_is_still_known(cluster: Cluster) -> None:
    operator = finish(cluster, cheap())
    closed = operator.ledger.state.closed["j"]
    del cluster.jobs["j"]["status"]
    operator.restart()
    settle_down(cluster, operator)
    status = cluster.jobs["j"]["status"]
    assert (status["state"], status["reason"]) == ("Completed", "Completed")
    assert status["message"] == (
        f"settled in {closed.entry}; what it cost is in the archive of the ledger"
    )
    assert (status["settlementEntry"], status["completionTime"]) == (
        closed.entry,
        f"{closed.time[:19]}Z",
    )
    assert [(c["type"], c["status"]) for c in status["conditions"]] == [("Succeeded", "True")]
    decision, actions = operator.round()
    assert (decision.records, actions) == ((), [])


def test_closed_failure_stays_a_failure(cluster: Cluster) -> None:
    cluster.apply(cheap())
    operator = Operator(cluster)
    for _ in range(4):
        operator.deliver()
        operator.round()
        cluster.job_controller()
    [pod] = cluster.pods
    for _ in range(3):
        cluster.advance(pod)
    cluster.finish(pod, crash=True)
    operator = finish(cluster, cluster.jobs["j"])
    del cluster.jobs["j"]["status"]
    operator.restart()
    settle_down(cluster, operator)
    status = cluster.jobs["j"]["status"]
    assert (status["state"], status["reason"]) == ("Failed", "ReportMissing")


def test_closed_job_is_never_granted_again(cluster: Cluster) -> None:
    """Not even where everything about it was changed by hand."""
    operator = finish(cluster, cheap())
    del cluster.jobs["j"]["status"]
    cluster.edit("j", priority=7)
    settle_down(cluster, operator)
    assert operator.ledger.state.grants == {}
    assert cluster.ledger.accounts["claim://vault/data/reviews.jsonl"].spending.jobs == 1


def test_time_to_live_counts_from_the_settlement(cluster: Cluster) -> None:
    operator = finish(cluster, cheap(ttlSecondsAfterFinished=7200))
    settled = operator.ledger.state.closed["j"].time
    for seconds, expected in ((7199, []), (7201, [DeleteJob])):
        cluster.now = parse_time(settled) + timedelta(seconds=seconds)
        _, actions = operator.round()
        assert [type(a) for a in actions if not isinstance(a, SetStatus)] == expected


def test_finished_workload_is_kept_as_long_as_its_job(cluster: Cluster) -> None:
    operator = finish(cluster, cheap())
    assert len(cluster.workloads) == 1
    cluster.delete("job", "j")
    operator.deliver()
    _, actions = operator.round()
    assert [type(a) for a in actions] == [Remove]
    assert cluster.workloads == {}


def test_workload_that_could_run_again_is_removed(cluster: Cluster) -> None:
    operator = finish(cluster, cheap())
    [workload] = cluster.workloads.values()
    workload["status"] = {}
    workload["spec"]["suspend"] = True
    operator.restart()
    snapshot = operator.picture.snapshot(operator.ledger.state, cluster.now)
    assert decide(snapshot, SETTINGS, operator.planner).records == ()
    operator.round()
    assert cluster.workloads == {}
