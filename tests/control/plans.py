"""Plans as tests ask for them: of a job on some blocks, or why there is none."""

import pytest
from tests.builders import SETTINGS, Object, block, snapshot

from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.control.access import Refusal
from dpmoe_operator.control.accounts import standings
from dpmoe_operator.control.planning import Planned, plan_job
from dpmoe_operator.control.views import JobView


def plan(asked: Object, *blocks: Object) -> Planned:
    return plan_job(JobView.of(asked), standings(snapshot(blocks or [block()])), SETTINGS)


def refusal(asked: Object, *blocks: Object) -> tuple[Reason, str]:
    with pytest.raises(Refusal) as refused:
        plan(asked, *blocks)
    return refused.value.reason, refused.value.message
