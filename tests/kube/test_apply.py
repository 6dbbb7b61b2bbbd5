"""How launches are brought to the cluster."""

import json

from tests.kube.conftest import StubServer, ok, refusal
from tests.launch.test_manifests import launch

from dpmoe_operator.control.actions import Prepare
from dpmoe_operator.control.views import QUEUE_NAME
from dpmoe_operator.kube.apply import Applier
from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.picture import Picture
from dpmoe_operator.launch.manifests import build_config_map, build_job

LAUNCH = launch()
UID = LAUNCH.job.uid


def stored(**labels: str) -> dict[str, object]:
    """Whatever is created, as the Job, or owned by it."""
    manifest = build_job(LAUNCH)
    owner = {"kind": "Job", "name": manifest["metadata"]["name"], "uid": "workload-1"}
    manifest["metadata"] |= {"uid": "workload-1", "ownerReferences": [owner]}
    manifest["metadata"]["labels"] |= labels
    return manifest | {"data": build_config_map(LAUNCH)["data"]}


async def prepare(client: KubeClient) -> Picture:
    picture = Picture()
    applier = Applier(client, picture, identity="test", leads=lambda: True)
    await applier.apply([Prepare(LAUNCH)])
    return picture


async def test_job_is_not_created_where_kueue_would_take_it_before_its_launch(
    stub: StubServer, client: KubeClient
) -> None:
    stub.script(ok(stored(**{QUEUE_NAME: "default"})))
    picture = await prepare(client)
    assert [call.query.get("dryRun") for call in stub.seen] == ["All"]
    assert picture.prepared == set()
    assert "LocalQueue 'default' before its launch" in picture.launch_errors[UID]


async def test_job_and_what_it_owns_are_created(stub: StubServer, client: KubeClient) -> None:
    stub.script(ok(stored()))
    picture = await prepare(client)
    made = [json.loads(call.body)["kind"] for call in stub.seen if "dryRun" not in call.query]
    assert made == ["Job", "ConfigMap", "Service", "NetworkPolicy"]
    assert (picture.prepared, picture.launch_errors) == ({UID}, {})


async def test_job_that_is_there_already_is_read(stub: StubServer, client: KubeClient) -> None:
    """Its label, where it has one, is Kueue's by now: another operator has released it."""
    taken = refusal(409, "AlreadyExists")
    stub.script(taken, taken, ok(stored(**{QUEUE_NAME: "gpus"})))
    picture = await prepare(client)
    assert picture.prepared == {UID}
