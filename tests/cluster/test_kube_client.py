"""The operator's own client against both servers: compare-and-swap, preconditions, watches."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dpmoe_operator.kube.client import KubeClient, Object
from dpmoe_operator.kube.config import load_access
from dpmoe_operator.kube.errors import (
    AlreadyExists,
    ApiError,
    Conflict,
    Invalid,
    NotFound,
    NotServed,
    OutcomeUnknown,
)
from dpmoe_operator.kube.resources import (
    CONFIG_MAPS,
    CUSTOM_RESOURCE_DEFINITIONS,
    NAMESPACES,
    PODS,
    Resource,
)
from dpmoe_operator.kube.watch import Informer


@pytest.fixture
async def client(api: Any) -> AsyncIterator[KubeClient]:
    async with KubeClient(load_access(api.kubeconfig)) as opened:
        yield opened


def config_map(name: str, **data: str) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


async def test_a_name_is_created_once(client: KubeClient, namespace: str) -> None:
    created = await client.create(CONFIG_MAPS, namespace, config_map("entry", k="1"))
    with pytest.raises(AlreadyExists, match="entry"):
        await client.create(CONFIG_MAPS, namespace, config_map("entry", k="2"))
    assert await client.get(CONFIG_MAPS, namespace, "entry") == created


async def test_a_stale_version_is_a_conflict(client: KubeClient, namespace: str) -> None:
    stale = await client.create(CONFIG_MAPS, namespace, config_map("m", k="1"))
    fresh = await client.patch(CONFIG_MAPS, namespace, "m", {"data": {"k": "2"}})
    with pytest.raises(Conflict):
        await client.replace(CONFIG_MAPS, namespace, "m", stale | {"data": {"k": "3"}})
    version = {"metadata": {"resourceVersion": stale["metadata"]["resourceVersion"]}}
    with pytest.raises(Conflict):
        await client.patch(CONFIG_MAPS, namespace, "m", version | {"data": {"k": "3"}})
    replaced = await client.replace(CONFIG_MAPS, namespace, "m", fresh | {"data": {"k": "4"}})
    assert replaced["data"] == {"k": "4"}


async def test_another_uid_is_refused(client: KubeClient, namespace: str) -> None:
    created = await client.create(CONFIG_MAPS, namespace, config_map("m"))
    other, uid = str(uuid.uuid4()), created["metadata"]["uid"]
    with pytest.raises(Invalid):
        await client.patch(CONFIG_MAPS, namespace, "m", {"metadata": {"uid": other}})
    with pytest.raises(Conflict):
        await client.delete(CONFIG_MAPS, namespace, "m", precondition_uid=other)
    with pytest.raises(Conflict):
        await client.delete(CONFIG_MAPS, namespace, "m", precondition_resource_version="1")
    await client.delete(CONFIG_MAPS, namespace, "m", precondition_uid=uid)
    with pytest.raises(NotFound):
        await client.get(CONFIG_MAPS, namespace, "m")


async def test_a_json_patch_changes_only_what_it_tested(client: KubeClient, namespace: str) -> None:
    await client.create(CONFIG_MAPS, namespace, config_map("m", k="1"))
    swap = [
        {"op": "test", "path": "/data/k", "value": "1"},
        {"op": "replace", "path": "/data/k", "value": "2"},
    ]
    patched = await client.patch(CONFIG_MAPS, namespace, "m", swap, patch_type="json")
    assert patched["data"] == {"k": "2"}
    with pytest.raises(ApiError) as refused:
        await client.patch(CONFIG_MAPS, namespace, "m", swap, patch_type="json")
    assert not isinstance(refused.value, OutcomeUnknown)


async def test_missing_things_are_told_apart(client: KubeClient, namespace: str) -> None:
    unheard = Resource("unheard.example", "v1", "things", "Thing")
    with pytest.raises(NotServed):
        await client.get(unheard, namespace, "x")
    with pytest.raises(NotServed):
        await client.list(unheard)
    with pytest.raises(NotFound, match="nobody"):
        await client.get(CONFIG_MAPS, namespace, "nobody")
    with pytest.raises(NotFound, match="no-such-namespace"):
        await client.create(CONFIG_MAPS, "no-such-namespace", config_map("m"))


async def test_lists_are_whole_and_filtered(client: KubeClient, namespace: str) -> None:
    for i in range(3):
        body = config_map(f"m{i}")
        body["metadata"]["labels"] = {"odd": str(i % 2)}
        await client.create(CONFIG_MAPS, namespace, body)
    items, version = await client.list(CONFIG_MAPS, namespace, label_selector="odd=0")
    assert [item["metadata"]["name"] for item in items] == ["m0", "m2"]
    assert {(item["apiVersion"], item["kind"]) for item in items} == {("v1", "ConfigMap")}
    assert version.isdigit()
    named, _ = await client.list(NAMESPACES, field_selector=f"metadata.name={namespace}")
    assert len(named) == 1


async def test_status_is_written_by_its_own_path(client: KubeClient, namespace: str) -> None:
    pod = {
        "metadata": {"name": "p"},
        "spec": {"schedulerName": "none", "containers": [{"name": "c", "image": "i"}]},
    }
    await client.create(PODS, namespace, pod)
    status = {"status": {"message": "by status"}}
    await client.patch(PODS, namespace, "p", {"status": {"message": "by pod"}})
    assert "message" not in (await client.get(PODS, namespace, "p"))["status"]
    patched = await client.patch(PODS, namespace, "p", status, "status")
    assert patched["status"]["message"] == "by status"


SCHEMA = {
    "type": "object",
    "properties": {"spec": {"type": "object", "properties": {"known": {"type": "string"}}}},
}


async def test_an_unknown_field_is_refused_and_not_dropped(
    client: KubeClient, namespace: str
) -> None:
    group = f"g{uuid.uuid4().hex[:8]}.example"
    strict = Resource(group, "v1", "stricts", "Strict")
    version = {"name": "v1", "served": True, "storage": True}
    definition = {
        "metadata": {"name": str(strict)},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"plural": "stricts", "singular": "strict", "kind": "Strict"},
            "versions": [version | {"schema": {"openAPIV3Schema": SCHEMA}}],
        },
    }
    await client.create(CUSTOM_RESOURCE_DEFINITIONS, None, definition)
    try:
        good = {"apiVersion": strict.api_version, "kind": "Strict", "metadata": {"name": "a"}}
        async with asyncio.timeout(30):
            while True:
                try:
                    await client.create(strict, namespace, good | {"spec": {"known": "x"}})
                    break
                except NotServed:
                    await asyncio.sleep(0.1)
        with pytest.raises(ApiError, match="unheard"):
            await client.patch(strict, namespace, "a", {"spec": {"unheard": "y"}})
        assert (await client.get(strict, namespace, "a"))["spec"] == {"known": "x"}
    finally:
        await client.delete(CUSTOM_RESOURCE_DEFINITIONS, None, str(strict))


async def test_an_informer_follows(client: KubeClient, namespace: str) -> None:
    told: asyncio.Queue[tuple[str, str, str | None]] = asyncio.Queue()

    def hear(type_: str, obj: Object) -> None:
        told.put_nowait((type_, obj["metadata"]["name"], (obj.get("data") or {}).get("k")))

    def labelled(name: str, value: str) -> Object:
        body = config_map(name, k=value)
        body["metadata"]["labels"] = {"mine": "yes"}
        return body

    await client.create(CONFIG_MAPS, namespace, labelled("before", "1"))
    informer = Informer(client, CONFIG_MAPS, namespace, "mine=yes", on_event=hear)
    task = asyncio.create_task(informer.run())
    try:
        async with asyncio.timeout(30):
            await informer.synced.wait()
            assert await told.get() == ("ADDED", "before", "1")
            await client.create(CONFIG_MAPS, namespace, labelled("after", "2"))
            assert await told.get() == ("ADDED", "after", "2")
            await client.patch(CONFIG_MAPS, namespace, "after", {"data": {"k": "3"}})
            assert await told.get() == ("MODIFIED", "after", "3")
            await client.delete(CONFIG_MAPS, namespace, "after")
            assert await told.get() == ("DELETED", "after", "3")
        assert set(informer.objects) == {(namespace, "before")}
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
