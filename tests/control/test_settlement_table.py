"""The table of docs/design/settlement.md, lived through: every way in which a job can end.

Each row is a whole life from the manifest to the ledger, and the documentation is held to what the
rows find.
"""

from pathlib import Path

import pytest
from tests.builders import TEAM, Object, block
from tests.control.cluster import Cluster
from tests.control.operator import Operator, settle_down
from tests.control.rows_once import ONCE
from tests.control.rows_restarted import RESTARTED
from tests.control.settlement_rows import ACCOUNT, OTHER_IMAGE, STEPS, TAKEN
from tests.control.stages import (
    grant_of,
    see,
    settled,
)

from dpmoe_operator.privacy.mechanisms import demand

PAGE = Path(__file__).parents[2] / "docs" / "design" / "settlement.md"

ROWS = ONCE | RESTARTED
CHARGED = {"nothing": 0, "the steps taken": TAKEN, "the plan": STEPS}


@pytest.mark.parametrize("how", ROWS)
def test_row(how: str) -> None:
    told = ROWS[how]
    cluster = Cluster()
    opened: Object = {
        "models": ["models"],
        "outputs": [{"claimName": "results"}],
        "images": [OTHER_IMAGE],
    }
    if told.restarts:
        opened["checkpoints"] = {"claimName": "checkpoints"}
    cluster.apply(block(uid="b", access=[{"namespace": TEAM, **opened}]))
    operator = Operator(cluster)
    see(operator)
    told.play(cluster, operator)
    settle_down(cluster, operator)

    account = cluster.ledger.accounts[ACCOUNT]
    status = cluster.jobs["j"]["status"] if "j" in cluster.jobs else None
    assert not any(account.spending.reserved)
    if told.charged == "never granted":
        assert cluster.ledger.grants == {}
        assert not any(account.spending.consumed)
        assert (status["reason"] if status else "-") == told.outcome
        assert cluster.workloads == {}
        return
    steps = CHARGED[told.charged]
    assert settled(cluster) == (told.outcome, steps)
    granted = grant_of(cluster).granted
    price = demand(
        float(granted.noise_multiplier),
        float(granted.sampling_rate),
        steps,
        tuple(map(float, account.opened.orders)),
    )
    assert account.spending.consumed == (price if steps else account.zero)
    assert cluster.steps.get("j", 0) <= steps
    if status is not None:
        assert status["reason"] == told.outcome
        assert status["state"] == ("Completed" if told.outcome == "Completed" else "Failed")
        assert status["stepsDone"] == steps


def documented() -> dict[str, tuple[str, str]]:
    """The table of the page: how a job ends, what is charged, and the outcome's name."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["how it ends", "charged", "outcome"]
    rows = cells[2:]
    assert len({how for how, _, _ in rows}) == len(rows)
    return {how: (charged, outcome) for how, charged, outcome in rows}


def test_page_says_what_the_rows_find() -> None:
    assert documented() == {how: (told.charged, told.outcome) for how, told in ROWS.items()}
