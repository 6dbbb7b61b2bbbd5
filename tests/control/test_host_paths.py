"""Folders of the nodes are mounted with the operator's rights: only those that were opened."""

from dataclasses import replace
from typing import Any

import pytest
from tests.builders import ABSENT, SETTINGS, block, job, snapshot

from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.control.access import Refusal
from dpmoe_operator.control.accounts import standings
from dpmoe_operator.control.planning import Planned, plan_job

OPEN = replace(SETTINGS, host_paths=("/srv/data",))


def planned(path: str, settings: object, **spec: Any) -> Planned:
    stored = block(dataset={"claim": ABSENT, "path": path})
    view = snapshot([stored], [job(uid="j", **spec)])
    return plan_job(view.jobs["j"], standings(view), settings)


@pytest.mark.parametrize("path", ["/srv/data/a.csv", "/etc/shadow"])
def test_none_are_open_by_default(path: str) -> None:
    with pytest.raises(Refusal, match="hostPaths") as refused:
        planned(path, SETTINGS)
    assert refused.value.reason is Reason.BLOCK_NOT_SHARED
    assert path in refused.value.message


def test_only_what_is_below_an_open_folder() -> None:
    assert planned("/srv/data/a.csv", OPEN).plan.blocks[0].data.path == "/srv/data/a.csv"
    for path in ("/srv/database/a.csv", "/srv/a.csv", "/etc/shadow"):
        with pytest.raises(Refusal):
            planned(path, OPEN)


@pytest.mark.parametrize("model", ["/models/secret/tiny", "/models/secret", "/models"])
def test_model_of_the_image_is_not_beside_a_mounted_table(model: str) -> None:
    opened = replace(SETTINGS, host_paths=("/models",))
    with pytest.raises(Refusal, match="no table of its blocks mounted there"):
        planned("/models/secret", opened, model={"claim": ABSENT, "path": model})
    other = {"claim": ABSENT, "path": "/models/secrets"}
    assert planned("/models/secret", opened, model=other).plan.model.path == "/models/secrets"
