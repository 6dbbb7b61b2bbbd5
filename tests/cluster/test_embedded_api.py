"""What only the embedded API server does, or deliberately does otherwise than a real one."""

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import aiohttp
import pytest
import yaml

from dpmoe_operator.local.apiserver import EmbeddedApiServer, store
from dpmoe_operator.local.apiserver.job_plan import plan_job
from dpmoe_operator.local.apiserver.job_pods import TRACKING_FINALIZER, build_pod, format_time
from dpmoe_operator.local.apiserver.logs import LOG_FILE_ANNOTATION
from dpmoe_operator.local.apiserver.patches import strategic_merge
from dpmoe_operator.local.apiserver.tables import duration, parse_path, walk

DEFAULT = "/api/v1/namespaces/default"
MERGE = {"Content-Type": "application/merge-patch+json"}


@pytest.fixture
async def server():
    async with EmbeddedApiServer() as server:
        yield server


@pytest.fixture
async def session(server):
    headers = {"Authorization": f"Bearer {server.token}"}
    async with aiohttp.ClientSession(server.url, headers=headers) as session:
        yield session


async def read(response, status=200):
    async with response as answer:
        assert answer.status == status, await answer.text()
        return await answer.json()


async def events_of(session, path):
    async with session.get(path) as answer:
        return [json.loads(line) async for line in answer.content]


async def eventually(session, path, holds):
    async with asyncio.timeout(20):
        while True:
            async with session.get(path) as answer:
                body = await answer.json()
                if holds(answer.status, body):
                    return body
            await asyncio.sleep(0.02)


# Access


async def test_every_path_but_probes_needs_the_token(server):
    async with aiohttp.ClientSession(server.url) as session:
        for path in ("/api", "/apis", "/openapi/v3", "/api/v1/pods", "/wrong/api", "/nothing"):
            refused = await read(session.get(path), status=401)
            assert refused["reason"] == "Unauthorized"
        for path in ("/readyz", "/livez", "/healthz", "/version"):
            async with session.get(path) as answer:
                assert answer.status == 200


async def test_the_token_may_come_in_the_path(server):
    """kubectl never sends a bearer token over plain HTTP."""
    async with aiohttp.ClientSession(server.url) as session:
        found = await read(session.get(f"/{server.token}/api/v1/namespaces/default"))
        assert found["metadata"]["name"] == "default"


async def test_the_kubeconfig_is_private(server, tmp_path):
    path = tmp_path / "kubeconfig"
    path.touch(mode=0o644)
    server.write_kubeconfig(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    config = yaml.safe_load(path.read_text())
    assert config["clusters"][0]["cluster"]["server"] == f"{server.url}/{server.token}"
    assert config["users"][0]["user"]["token"] == server.token


# The process


def run_server(*arguments, **options):
    command = [sys.executable, "-m", "dpmoe_operator.local.apiserver", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_port_in_use_is_one_clear_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = run_server("--port", str(port), "--kubeconfig", str(tmp_path / "k"))
        output, error = process.communicate(timeout=30)
    assert (process.returncode, output) == (2, "")
    [line] = error.splitlines()
    assert line.startswith(f"--port {port}: ")
    assert "--port 0" in line
    assert not (tmp_path / "k").exists()


def test_a_kubeconfig_that_can_not_be_written_is_one_clear_line(tmp_path):
    path = tmp_path / "no" / "such" / "kubeconfig"
    process = run_server("--kubeconfig", str(path))
    _, error = process.communicate(timeout=30)
    assert process.returncode == 2
    [line] = error.splitlines()
    assert line.startswith(f"--kubeconfig {path}: ")


def test_the_process_serves_until_it_is_told_to_stop(tmp_path):
    process = run_server("--kubeconfig", str(tmp_path / "k"))
    assert process.stdout.readline().startswith("ready: http://127.0.0.1:")
    os.kill(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (0, "")


# Formats


async def test_protobuf_is_refused(session):
    headers = {"Content-Type": "application/vnd.kubernetes.protobuf"}
    refused = session.post(f"{DEFAULT}/configmaps", data=b"k8s\0", headers=headers)
    assert (await read(refused, status=415))["reason"] == "UnsupportedMediaType"


async def test_an_unreadable_column_is_refused(session):
    column = {"name": "X", "type": "string", "jsonPath": ".spec..deep"}
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": {"type": "object"}},
        "additionalPrinterColumns": [column],
    }
    body = {
        "metadata": {"name": "things.test.dev"},
        "spec": {
            "group": "test.dev",
            "scope": "Cluster",
            "names": {"plural": "things", "kind": "Thing"},
            "versions": [version],
        },
    }
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    refused = await read(session.post(path, json=body), status=422)
    assert "additionalPrinterColumns[0].jsonPath" in refused["message"]


# Watches and their history


async def test_a_version_older_than_the_history_is_gone(session, monkeypatch):
    monkeypatch.setattr(store, "HISTORY", 4)
    first = await read(session.get(f"{DEFAULT}/configmaps"))
    since = first["metadata"]["resourceVersion"]
    for number in range(8):
        body = {"metadata": {"name": f"c{number}"}}
        await read(session.post(f"{DEFAULT}/configmaps", json=body), status=201)
    path = f"{DEFAULT}/configmaps?watch=1&timeoutSeconds=1&resourceVersion"
    [event] = await events_of(session, f"{path}={since}")
    assert (event["type"], event["object"]["code"]) == ("ERROR", 410)
    kept = await events_of(session, f"{path}={int(since) + 4}")
    assert [each["object"]["metadata"]["name"] for each in kept] == ["c4", "c5", "c6", "c7"]


async def test_a_version_of_an_earlier_run_is_gone(session):
    path = f"{DEFAULT}/configmaps?watch=1&timeoutSeconds=1&resourceVersion=99999"
    [event] = await events_of(session, path)
    assert (event["type"], event["object"]["code"]) == ("ERROR", 410)


async def test_a_live_watch_sees_changes_as_they_happen(session):
    async with session.get(f"{DEFAULT}/configmaps?watch=1") as stream:
        for name in ("a", "b"):
            body = {"metadata": {"name": name}}
            await read(session.post(f"{DEFAULT}/configmaps", json=body), status=201)
            async with asyncio.timeout(10):
                event = json.loads(await stream.content.readline())
            assert (event["type"], event["object"]["metadata"]["name"]) == ("ADDED", name)


async def test_watches_end_with_the_server():
    async with EmbeddedApiServer() as server:
        headers = {"Authorization": f"Bearer {server.token}"}
        session = aiohttp.ClientSession(server.url, headers=headers)
        stream = await session.get("/api/v1/pods?watch=1")
    async with asyncio.timeout(10):
        assert await stream.content.read() == b""
    await session.close()


async def test_a_deleted_definition_ends_its_watches(server):
    store_ = server.cluster.store
    store_.open(("test.dev", "things"))
    with store_.watch(("test.dev", "things"), store_.revision) as cursor:
        store_.drop(("test.dev", "things"))
        assert cursor.closed


# Volumes and Jobs


async def test_claims_are_bound_at_once(session):
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    body = {"metadata": {"name": "claim"}, "spec": spec}
    path = f"{DEFAULT}/persistentvolumeclaims"
    claim = await read(session.post(path, json=body), status=201)
    assert claim["status"]["phase"] == "Bound"
    assert claim["status"]["capacity"] == {"storage": "1Gi"}
    assert claim["spec"]["volumeName"]


TEMPLATE = {"spec": {"restartPolicy": "Never", "containers": [{"name": "main", "image": "some"}]}}


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"manualSelector": True}, "spec.manualSelector"),
        ({"managedBy": "test.dev/other"}, "spec.managedBy"),
        (
            {"podFailurePolicy": {"rules": [{"action": "FailIndex"}]}},
            "spec.podFailurePolicy.rules[0].action",
        ),
    ],
)
async def test_what_the_job_controller_lacks_is_refused(session, spec, field):
    body = {"metadata": {"name": "j"}, "spec": {"template": TEMPLATE, **spec}}
    path = "/apis/batch/v1/namespaces/default/jobs"
    refused = await read(session.post(path, json=body), status=422)
    assert field in [each["field"] for each in refused["details"]["causes"]]


NOW = datetime(2026, 1, 1, tzinfo=UTC)


def job(**spec):
    defaults = {
        "parallelism": 2,
        "completions": 2,
        "completionMode": "Indexed",
        "backoffLimit": 1,
        "suspend": False,
        "podReplacementPolicy": "TerminatingOrFailed",
    }
    metadata = {"name": "j", "uid": "u", "namespace": "n"}
    pod_metadata = {"metadata": {"labels": {}}}
    return {
        "metadata": metadata,
        "spec": {**defaults, "template": pod_metadata | TEMPLATE, **spec},
        "status": {"startTime": format_time(NOW)},
    }


def pod(job, index, phase="Pending", **more):
    body = build_pod(job, index)
    metadata = {
        **body["metadata"],
        "name": f"j-{index}",
        "namespace": "n",
        "creationTimestamp": format_time(NOW),
        **more,
    }
    return {**body, "metadata": metadata, "status": {"phase": phase}}


def test_a_plan_is_stable_once_all_pods_run():
    wanted = job()
    plan = plan_job(wanted, [], NOW)
    assert plan.create == [0, 1]
    pods = [pod(wanted, index) for index in plan.create]
    again = plan_job({**wanted, "status": plan.status}, pods, NOW)
    assert (again.create, again.delete, again.release) == ([], [], [])
    assert again.status == plan.status


def test_a_counted_pod_is_not_counted_twice():
    wanted = job()
    counted = pod(wanted, 0, "Failed")
    plan = plan_job(wanted, [counted, pod(wanted, 1)], NOW)
    assert (plan.status["failed"], plan.failures, plan.release) == (1, 1, [counted])
    counted["metadata"]["finalizers"].remove(TRACKING_FINALIZER)
    again = plan_job({**wanted, "status": plan.status}, [counted, pod(wanted, 1)], NOW)
    assert (again.status["failed"], again.failures, again.release) == (1, 0, [])


def test_no_pod_is_created_while_backing_off():
    plan = plan_job(job(), [], NOW, backoff_seconds=3.0)
    assert (plan.create, plan.check_after) == ([], 3.0)


def test_a_terminating_pod_keeps_its_index_if_only_failed_ones_are_replaced():
    leaving = {"deletionTimestamp": format_time(NOW)}
    for policy, created in (("Failed", []), ("TerminatingOrFailed", [0])):
        wanted = job(podReplacementPolicy=policy)
        pods = [pod(wanted, 0, "Running", **leaving), pod(wanted, 1, "Running")]
        pods[0]["spec"] = {**pods[0]["spec"], "nodeName": "node-1"}
        plan = plan_job(wanted, pods, NOW)
        assert plan.create == created
        assert plan.status["terminating"] == 1


def test_less_parallelism_deletes_the_highest_indexes():
    wanted = job(parallelism=1)
    plan = plan_job(wanted, [pod(wanted, 1), pod(wanted, 0)], NOW)
    assert [each["metadata"]["name"] for each in plan.delete] == ["j-1"]


def test_an_open_ended_job_completes_when_its_pods_have_ended():
    wanted = job(completionMode="NonIndexed", completions=None)
    done, runs = pod(wanted, None, "Succeeded"), pod(wanted, None, "Running")
    plan = plan_job(wanted, [done, runs], NOW)
    assert plan.create == []
    assert "conditions" not in plan.status
    plan = plan_job(wanted, [done], NOW)
    assert [each["type"] for each in plan.status["conditions"]] == [
        "SuccessCriteriaMet",
        "Complete",
    ]


def test_a_deadline_is_awaited_and_then_kept():
    wanted = job(activeDeadlineSeconds=10)
    pods = [pod(wanted, index) for index in (0, 1)]
    assert plan_job(wanted, pods, NOW + timedelta(seconds=4)).check_after == 6
    plan = plan_job(wanted, pods, NOW + timedelta(seconds=10))
    assert plan.status["conditions"][0]["reason"] == "DeadlineExceeded"
    assert plan.stop == pods


async def test_an_expired_failure_is_retried_after_a_short_while(session):
    body = {"metadata": {"name": "j"}, "spec": {"template": TEMPLATE, "backoffLimit": 3}}
    await read(session.post("/apis/batch/v1/namespaces/default/jobs", json=body), status=201)
    path = f"{DEFAULT}/pods?labelSelector=job-name%3Dj"
    for count in (1, 2):
        found = await eventually(session, path, lambda _, body, n=count: len(body["items"]) == n)
        pending = [each for each in found["items"] if each["status"]["phase"] == "Pending"]
        name = pending[0]["metadata"]["name"]
        patch = {"status": {"phase": "Failed"}}
        status = f"{DEFAULT}/pods/{name}/status"
        await read(session.patch(status, data=json.dumps(patch), headers=MERGE))


# Logs


@pytest.fixture
async def logged(session, tmp_path):
    """A running pod whose output goes to the file that is returned."""
    path = tmp_path / "output.log"
    path.write_text("one\ntwo\nthree\n")
    body = {
        "metadata": {"name": "p", "annotations": {LOG_FILE_ANNOTATION: str(path)}},
        "spec": {"containers": [{"name": "main", "image": "some"}]},
    }
    await read(session.post(f"{DEFAULT}/pods", json=body), status=201)
    return path


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", "one\ntwo\nthree\n"),
        ("?tailLines=2", "two\nthree\n"),
        ("?tailLines=9", "one\ntwo\nthree\n"),
        ("?tailLines=0", ""),
    ],
)
async def test_logs_are_read_from_the_file_of_the_annotation(session, logged, query, expected):
    async with session.get(f"{DEFAULT}/pods/p/log{query}") as answer:
        assert answer.content_type == "text/plain"
        assert await answer.text() == expected


async def test_logs_are_followed_until_the_pod_ends(session, logged):
    async with asyncio.timeout(20):
        async with session.get(f"{DEFAULT}/pods/p/log?follow=true&tailLines=1") as answer:
            assert await answer.content.readline() == b"three\n"
            with logged.open("a") as file:
                file.write("four\n")
            assert await answer.content.readline() == b"four\n"
            patch = json.dumps({"status": {"phase": "Succeeded"}})
            await read(session.patch(f"{DEFAULT}/pods/p/status", data=patch, headers=MERGE))
            assert await answer.content.read() == b""


async def test_a_pod_without_a_log_is_waiting_to_start(session, logged):
    patch = json.dumps({"metadata": {"annotations": None}})
    await read(session.patch(f"{DEFAULT}/pods/p", data=patch, headers=MERGE))
    refused = await read(session.get(f"{DEFAULT}/pods/p/log"), status=400)
    assert "waiting to start" in refused["message"]
    await read(session.get(f"{DEFAULT}/pods/none/log"), status=404)
    await read(session.get(f"{DEFAULT}/pods/p/log?previous=true"), status=400)


async def test_kubectl_reads_logs(server, logged, tmp_path):
    kubeconfig = tmp_path / "kubeconfig"
    server.write_kubeconfig(kubeconfig)
    process = await asyncio.create_subprocess_exec(
        os.path.join(os.path.dirname(sys.executable), "kubectl"),
        f"--kubeconfig={kubeconfig}",
        "logs",
        "p",
        "--tail=2",
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert (process.returncode, output) == (0, b"two\nthree\n")


# Pure parts


@pytest.mark.parametrize(
    ("patch", "expected"),
    [
        ({"a": {"$patch": "replace", "z": 1}}, {"a": {"z": 1}, "finalizers": ["x", "y"]}),
        ({"a": {"$patch": "delete"}}, {"a": {}, "finalizers": ["x", "y"]}),
        (
            {"a": {"$retainKeys": ["c"], "c": 3}},
            {"a": {"c": 3}, "finalizers": ["x", "y"]},
        ),
        ({"finalizers": ["z"]}, {"a": {"b": 1, "c": 2}, "finalizers": ["x", "y", "z"]}),
        (
            {"$deleteFromPrimitiveList/finalizers": ["x"]},
            {"a": {"b": 1, "c": 2}, "finalizers": ["y"]},
        ),
    ],
)
def test_strategic_merge_directives(patch, expected):
    target = {"a": {"b": 1, "c": 2}, "finalizers": ["x", "y"]}
    assert strategic_merge(target, patch) == expected
    assert target == {"a": {"b": 1, "c": 2}, "finalizers": ["x", "y"]}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0s"),
        (0, "0s"),
        (119, "119s"),
        (120, "2m"),
        (125, "2m5s"),
        (600, "10m"),
        (3 * 3600, "3h"),
        (3 * 3600 + 60, "3h1m"),
        (8 * 3600 + 60, "8h"),
        (2 * 86400, "2d"),
        (2 * 86400 + 3600, "2d1h"),
        (9 * 86400 + 3600, "9d"),
    ],
)
def test_durations_read_as_in_kubectl(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("path", "values"),
    [
        (".a.b", [1]),
        ("{.a.b}", [1]),
        (".a['c.d']", [2]),
        (r".a.c\.d", [2]),
        (".list[0].n", ["x"]),
        (".list[-1].n", ["y"]),
        (".list[*].n", ["x", "y"]),
        ('.list[?(@.n=="y")].v', [4]),
        (".none.at.all", []),
    ],
)
def test_paths_of_printer_columns(path, values):
    obj = {"a": {"b": 1, "c.d": 2}, "list": [{"n": "x", "v": 3}, {"n": "y", "v": 4}]}
    assert walk(parse_path(path), obj) == values
