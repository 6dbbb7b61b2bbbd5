"""The demo tells the same story under every policy: who is granted, who waits, and why."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.builders import (
    NOW,
    SETTINGS,
    Object,
    commit,
    merged,
    metadata,
    snapshot,
    with_accounts,
)

from dpmoe_operator.control.decide import decide
from dpmoe_operator.control.planning import Planner
from dpmoe_operator.scheduling.policies import POLICIES

DEMO = Path(__file__).parents[2] / "examples" / "demo"
EXTRA = DEMO.parent / "extra"


def stored(manifest: Object) -> Object:
    """As the API server keeps it, created when it was applied."""
    meta = metadata(manifest["metadata"]["name"], manifest["metadata"]["namespace"], "")
    uid = manifest["metadata"]["name"]
    result: Object = merged(manifest, {"metadata": meta | {"uid": uid}})
    result["metadata"]["creationTimestamp"] = NOW.strftime("%Y-%m-%dT%H:%M:%SZ")
    return result


def manifests(kind: str) -> list[Any]:
    texts = [path.read_text() for path in sorted(DEMO.glob("*.yaml"))]
    found = [one for text in texts for one in yaml.safe_load_all(text) if one["kind"] == kind]
    return [stored(one) for one in found]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_the_story_holds(name: str) -> None:
    settings = replace(SETTINGS, policy=name)
    blocks, jobs = manifests("PrivateBlock"), manifests("DPMoEJob")
    ledger, planner = with_accounts(*blocks), Planner(settings)
    granted, reasons = set(), {}
    for _ in range(2):
        decision = decide(snapshot(blocks, jobs, ledger=ledger), settings, planner)
        records = decision.allocation.granted
        granted |= {record.job.name for record in records}
        reasons = {uid: str(one.reason) for uid, one in decision.allocation.waiting.items()}
        if records:
            commit(ledger, *records)
    assert granted == {"sentiment-small", "sentiment-both"}
    assert reasons == {
        "sentiment-greedy": "WaitingForUnlock",
        "sentiment-denied": "BlockNotShared",
    }
    elastic = stored(yaml.safe_load((EXTRA / "elastic-job.yaml").read_text()))
    decision = decide(snapshot(blocks, [*jobs, elastic], ledger=ledger), settings, planner)
    [record] = decision.allocation.granted
    assert (record.job.name, record.epsilon, len(record.charges)) == ("sentiment-elastic", "7", 2)
