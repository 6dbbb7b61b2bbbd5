"""The chart on a real API server: installed, with the rights of its own ServiceAccount, removed."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.chart.calls import CLUSTER, DATA, LEDGER, Call
from tests.chart.helm import only
from tests.cluster.installation import (
    BLOCK,
    DATA_NAMESPACE,
    JOB,
    OPERATOR_NAMESPACE,
    OTHER_NAMESPACE,
    TEAM_NAMESPACE,
    VALUES,
    Installation,
    eventually,
    installed,
    open_account,
)

from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.config import load_access
from dpmoe_operator.kube.errors import Forbidden
from dpmoe_operator.kube.resources import (
    CONFIG_MAPS,
    CUSTOM_RESOURCE_DEFINITIONS,
    DPMOE_JOBS,
    EVENTS,
    JOBS,
    LEDGER_ENTRIES,
    NETWORK_POLICIES,
    PRIVATE_BLOCKS,
    SECRETS,
    SERVICES,
)

pytestmark = pytest.mark.envtest

WRITE = ("create", "update", "patch", "delete", "deletecollection")

FORBIDDEN: list[tuple[str, str, str, tuple[str, ...]]] = [
    (OPERATOR_NAMESPACE, "dpmoe.dev", "ledgerentries", ("update", "patch", "watch")),
    (OPERATOR_NAMESPACE, "dpmoe.dev", "ledgerentries", ("deletecollection",)),
    (OTHER_NAMESPACE, "dpmoe.dev", "ledgerentries", ("get", "list", "create", "delete")),
    (DATA_NAMESPACE, "dpmoe.dev", "privateblocks", WRITE),
    (TEAM_NAMESPACE, "dpmoe.dev", "dpmoejobs", ("create", "update", "patch", "deletecollection")),
    (DATA_NAMESPACE, "dpmoe.dev", "privateblocks/status", ("update",)),
    (OTHER_NAMESPACE, "batch", "jobs", ("get", "list", "create", "patch", "delete")),
    (OPERATOR_NAMESPACE, "batch", "jobs", ("list", "create")),
    (DATA_NAMESPACE, "batch", "jobs", ("update", "deletecollection")),
    (DATA_NAMESPACE, "", "pods", (*WRITE, "get")),
    (DATA_NAMESPACE, "", "pods/exec", ("create", "get")),
    (DATA_NAMESPACE, "", "pods/log", ("get",)),
    (OTHER_NAMESPACE, "", "pods", ("list", "watch")),
    (DATA_NAMESPACE, "", "configmaps", ("list", "update", "patch", "delete")),
    (DATA_NAMESPACE, "", "persistentvolumeclaims", ("get", "list", "create")),
    (DATA_NAMESPACE, "", "serviceaccounts/token", ("create",)),
    (OPERATOR_NAMESPACE, "", "secrets", ("get", "list", "create")),
    (DATA_NAMESPACE, "", "secrets", ("get", "list", "watch")),
    ("", "", "namespaces", ("get", "list", "create", "delete")),
    ("", "", "nodes", ("list",)),
    ("", "apiextensions.k8s.io", "customresourcedefinitions", ("get", "update", "delete")),
    (
        "",
        "admissionregistration.k8s.io",
        "validatingadmissionpolicies",
        ("create", "update", "delete"),
    ),
    ("", "rbac.authorization.k8s.io", "clusterroles", ("create", "bind", "escalate")),
]
"""What a stolen token must not be able to do: namespace, group, resource, verbs."""


@pytest.fixture(scope="module")
def installation(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    with installed(request, tmp_path_factory.mktemp("chart")) as installation:
        yield installation


@pytest.fixture
async def admin(installation: Installation) -> AsyncIterator[KubeClient]:
    async with KubeClient(load_access(installation.server.kubeconfig)) as client:
        yield client


@pytest.fixture
async def operator(installation: Installation) -> AsyncIterator[KubeClient]:
    """A client with the rights of the operator's ServiceAccount."""
    async with KubeClient(load_access(installation.kubeconfig)) as client:
        yield client


async def allowed(client: KubeClient, namespace: str, calls: Iterable[Call]) -> set[Call]:
    """Those of the calls that the server says it would allow."""

    async def ask(call: Call) -> tuple[Call, bool]:
        group, resource, verb = call
        main, _, subresource = resource.partition("/")
        attributes = {
            "namespace": namespace,
            "group": group,
            "resource": main,
            "subresource": subresource,
            "verb": verb,
            "name": "dpmoe-operator" if resource == "leases" and verb != "create" else "",
        }
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        answer = await client.raw("POST", path, review)
        return call, answer["status"]["allowed"]

    return {call for call, yes in await asyncio.gather(*map(ask, calls)) if yes}


async def test_every_call_of_the_operator_is_allowed(operator: KubeClient) -> None:
    await eventually_allowed(operator, DATA_NAMESPACE, DATA)
    for namespace in ("", DATA_NAMESPACE, TEAM_NAMESPACE, OTHER_NAMESPACE):
        assert await allowed(operator, namespace, CLUSTER) == CLUSTER
    assert await allowed(operator, OPERATOR_NAMESPACE, LEDGER) == LEDGER


async def test_everything_else_is_refused(operator: KubeClient) -> None:
    for namespace, group, resource, verbs in FORBIDDEN:
        calls = {(group, resource, verb) for verb in verbs}
        assert not await allowed(operator, namespace, calls), namespace


async def test_refusals_are_real(operator: KubeClient, admin: KubeClient) -> None:
    await admin.create(SECRETS, DATA_NAMESPACE, {"metadata": {"name": "key"}})
    with pytest.raises(Forbidden):
        await operator.get(SECRETS, DATA_NAMESPACE, "key")
    with pytest.raises(Forbidden):
        await operator.create(PRIVATE_BLOCKS, DATA_NAMESPACE, BLOCK)
    with pytest.raises(Forbidden):
        await operator.list(JOBS, OTHER_NAMESPACE)


async def eventually_allowed(operator: KubeClient, namespace: str, calls: frozenset[Call]) -> None:
    """Wait until of the calls in a data namespace just these are allowed.

    The server's authorizer learns of changed roles by a watch of its own.
    """

    async def heard() -> bool:
        return await allowed(operator, namespace, DATA) == calls

    await eventually(heard, f"{len(calls)} calls are allowed in {namespace}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def operator_process(installation: Installation, port: int, log: Path) -> subprocess.Popen[bytes]:
    """The operator as the Deployment would run it, but for addresses and the anchor's folder."""
    manifest = installation.helm("get", "manifest", "dpmoe", "-n", OPERATOR_NAMESPACE).stdout
    deployment = only(list(yaml.safe_load_all(manifest)), "Deployment", "dpmoe-operator")
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    fields = {"metadata.namespace": OPERATOR_NAMESPACE, "metadata.uid": str(uuid.uuid4())}
    variables = {
        variable["name"]: variable["value"]
        if "value" in variable
        else fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        for variable in container["env"]
    }
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert mounts == [variables["NUMBA_CACHE_DIR"], variables["DPMOE_ANCHOR"]]
    anchor = log.with_name("anchor")
    anchor.mkdir()
    variables |= {
        "KUBECONFIG": str(installation.kubeconfig),
        "DPMOE_ANCHOR": str(anchor),
        "NUMBA_CACHE_DIR": str(log.with_name("cache")),
        "DPMOE_LIVENESS": f"http://127.0.0.1:{port}/healthz",
    }
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "dpmoe_operator.cli.main", *container["args"]],
            env=os.environ | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


async def test_the_operator_works_with_these_rights(
    installation: Installation, admin: KubeClient, tmp_path: Path
) -> None:
    log, port = tmp_path / "operator.log", free_port()
    process = operator_process(installation, port, log)
    try:
        await admin.create(PRIVATE_BLOCKS, DATA_NAMESPACE, BLOCK)
        await admin.create(DPMOE_JOBS, TEAM_NAMESPACE, JOB)

        async def released() -> Any:
            assert process.poll() is None, log.read_text()
            jobs, _ = await admin.list(JOBS, DATA_NAMESPACE)
            return [job for job in jobs if not job["spec"]["suspend"]]

        async def projected() -> Any:
            block = await admin.get(PRIVATE_BLOCKS, DATA_NAMESPACE, "visits")
            job = await admin.get(DPMOE_JOBS, TEAM_NAMESPACE, "triage")
            return block.get("status", {}).get("state") and job.get("status", {}).get("state")

        async def announced() -> Any:
            events, _ = await admin.list(EVENTS, TEAM_NAMESPACE)
            return [e for e in events if e["regarding"]["name"] == "triage"]

        [job] = await eventually(released, "the job is launched")
        name = job["metadata"]["name"]
        for resource in (CONFIG_MAPS, SERVICES, NETWORK_POLICIES):
            await admin.get(resource, DATA_NAMESPACE, name)
        await eventually(projected, "block and job have a state")
        await eventually(announced, "an event tells of it")
        assert await asyncio.to_thread(is_healthy, port)

        await admin.delete(DPMOE_JOBS, TEAM_NAMESPACE, "triage")

        async def removed() -> bool:
            jobs, _ = await admin.list(JOBS, DATA_NAMESPACE)
            return not jobs

        await eventually(removed, "what was launched is removed with its job")
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 30) == 0
    finally:
        process.kill()
        process.wait()
    assert "forbidden" not in log.read_text().lower()
    assert (await admin.list(LEDGER_ENTRIES, OPERATOR_NAMESPACE))[0]


async def test_the_ledger_outlives_the_release(
    installation: Installation, operator: KubeClient, admin: KubeClient
) -> None:
    entry = await open_account(operator)

    installation.upgrade({"dataNamespaces": [DATA_NAMESPACE, OTHER_NAMESPACE]})
    await eventually_allowed(operator, OTHER_NAMESPACE, DATA)
    installation.upgrade(VALUES)
    await eventually_allowed(operator, OTHER_NAMESPACE, frozenset())

    installation.uninstall()
    await eventually_allowed(operator, DATA_NAMESPACE, frozenset())
    definitions, _ = await admin.list(CUSTOM_RESOURCE_DEFINITIONS)
    assert len([d for d in definitions if d["spec"]["group"] == "dpmoe.dev"]) == 3
    kept = await admin.get(LEDGER_ENTRIES, OPERATOR_NAMESPACE, entry)

    # In another namespace the ledger would be empty, and all the budget there again.
    refused = installation.install(OTHER_NAMESPACE, check=False)
    assert f'must equal "{OTHER_NAMESPACE}"' in refused
    installation.install(OPERATOR_NAMESPACE)
    assert await admin.get(LEDGER_ENTRIES, OPERATOR_NAMESPACE, entry) == kept


def test_a_second_operator_in_the_cluster_is_refused(installation: Installation) -> None:
    refused = installation.install(OTHER_NAMESPACE, "--set", "crds.install=false", check=False)
    assert '"dpmoe-operator' in refused
    assert "exists and cannot be imported" in refused


def test_the_block_in_the_notes_is_accepted(installation: Installation) -> None:
    notes = installation.helm("get", "notes", "dpmoe", "-n", OPERATOR_NAMESPACE).stdout
    manifest = notes.split("<<'EOF'\n")[1].split("  EOF\n")[0]
    result = installation.kubectl("apply", "--dry-run=server", "-f", "-", stdin=manifest)
    assert result.returncode == 0, result.stderr
    assert "privateblock.dpmoe.dev/reviews-2025 created (server dry run)" in result.stdout
