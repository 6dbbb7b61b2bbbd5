"""Unmodified clients on both servers: kubectl, a kopf operator, the official Python client."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import kubernetes
import pytest

GROUP = "clients.dpmoe.dev"
DEFINITION = f"""
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {{name: robots.{GROUP}}}
spec:
  group: {GROUP}
  scope: Namespaced
  names: {{plural: robots, singular: robot, kind: Robot, shortNames: [rob]}}
  versions:
  - name: v1
    served: true
    storage: true
    subresources: {{status: {{}}}}
    additionalPrinterColumns:
    - {{name: Size, type: integer, jsonPath: .spec.size}}
    - {{name: Phase, type: string, jsonPath: .status.phase}}
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec:
            type: object
            description: What is wanted.
            properties:
              size: {{type: integer, minimum: 1, description: How big it is.}}
          status:
            type: object
            x-kubernetes-preserve-unknown-fields: true
"""


def robot(name="r", size=1):
    metadata = {"name": name}
    head = {"apiVersion": f"{GROUP}/v1", "kind": "Robot", "metadata": metadata}
    return json.dumps({**head, "spec": {"size": size}})


@pytest.fixture(scope="session")
def robots(kubectl):
    """Defines the resource, with kubectl alone."""
    kubectl("apply", "-f", "-", stdin=DEFINITION)
    kubectl("wait", "--for=condition=Established", f"crd/robots.{GROUP}", "--timeout=30s")


@pytest.fixture
def ctl(kubectl, namespace):
    """kubectl in the test's own namespace."""

    def run(*arguments, **options):
        return kubectl("--namespace", namespace, *arguments, **options)

    return run


# kubectl


def test_kubectl_applies_and_gets(robots, ctl):
    assert "created" in ctl("apply", "-f", "-", stdin=robot()).stdout
    assert "unchanged" in ctl("apply", "-f", "-", stdin=robot()).stdout
    assert "configured" in ctl("apply", "-f", "-", stdin=robot(size=2)).stdout
    header, row = ctl("get", "rob").stdout.splitlines()
    assert header.split() == ["NAME", "SIZE", "PHASE"]
    assert row.split()[:2] == ["r", "2"]
    shown = ctl("get", "robots", "r", "-o", "yaml").stdout
    assert "size: 2" in shown
    assert ctl("get", "rob", "-o", "name").stdout.strip() == f"robot.{GROUP}/r"


def test_kubectl_shows_refusals(robots, ctl):
    typo = robot().replace("size", "sise")
    refused = ctl("apply", "-f", "-", stdin=typo, check=False)
    assert refused.returncode != 0
    assert 'unknown field "spec.sise"' in refused.stderr
    refused = ctl("apply", "-f", "-", stdin=robot(size=0), check=False)
    assert "should be greater than or equal to 1" in refused.stderr
    refused = ctl("get", "rob", "none", check=False)
    assert f'robots.{GROUP} "none" not found' in refused.stderr


def test_kubectl_explains(robots, ctl):
    explained = ctl("explain", "robot.spec").stdout
    assert "What is wanted." in explained
    assert "size" in explained


def test_kubectl_describes_with_events(robots, ctl, http, namespace):
    ctl("create", "-f", "-", stdin=robot())
    uid = http.get(f"/apis/{GROUP}/v1/namespaces/{namespace}/robots/r")["metadata"]["uid"]
    event = {
        "metadata": {"generateName": "e-", "namespace": namespace},
        "involvedObject": {
            "kind": "Robot",
            "apiVersion": f"{GROUP}/v1",
            "name": "r",
            "namespace": namespace,
            "uid": uid,
        },
        "reason": "Built",
        "message": "it works",
        "type": "Normal",
        "count": 1,
        "source": {"component": "tester"},
        "lastTimestamp": "2026-01-01T00:00:00Z",
        "firstTimestamp": "2026-01-01T00:00:00Z",
    }
    http.create(f"/api/v1/namespaces/{namespace}/events", event)
    described = ctl("describe", "robot", "r").stdout
    assert "Size:  1" in described
    assert "it works" in described
    assert "robot/r" in ctl("get", "events").stdout


def test_kubectl_patches_and_waits(robots, ctl):
    ctl("create", "-f", "-", stdin=robot())
    phase = json.dumps({"status": {"phase": "Done"}})
    ctl("patch", "rob", "r", "--subresource=status", "--type=merge", "-p", phase)
    ctl("wait", "--for=jsonpath={.status.phase}=Done", "rob/r", "--timeout=20s")
    operations = json.dumps([{"op": "replace", "path": "/spec/size", "value": 5}])
    ctl("patch", "rob", "r", "--type=json", "-p", operations)
    ctl("label", "rob", "r", "color=red")
    shown = ctl("get", "rob", "-l", "color=red", "-o", "jsonpath={.items[*].spec.size}").stdout
    assert shown == "5"


def test_kubectl_applies_server_side(robots, ctl):
    ctl("apply", "--server-side", "-f", "-", stdin=robot(size=3))
    assert (
        "serverside-applied" in ctl("apply", "--server-side", "-f", "-", stdin=robot(size=4)).stdout
    )
    assert ctl("get", "rob", "r", "-o", "jsonpath={.spec.size}").stdout == "4"


def test_kubectl_applies_built_in_objects(ctl):
    def config_map(data):
        head = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}}
        return json.dumps({**head, "data": data})

    ctl("apply", "-f", "-", stdin=config_map({"a": "1", "b": "2"}))
    ctl("apply", "-f", "-", stdin=config_map({"a": "3"}))
    assert json.loads(ctl("get", "cm", "c", "-o", "json").stdout)["data"] == {"a": "3"}


def test_kubectl_watches(robots, ctl, api, kubectl, namespace):
    ctl("create", "-f", "-", stdin=robot())
    arguments = ("get", "rob", "-w", "--request-timeout=2s")
    shown = ctl(*arguments, check=False).stdout.splitlines()
    assert shown[0].split() == ["NAME", "SIZE", "PHASE"]
    assert shown[1].split()[0] == "r"


def test_kubectl_deletes_and_waits(robots, ctl):
    ctl("create", "-f", "-", stdin=robot())
    ctl("delete", "rob", "r", "--timeout=20s")
    assert ctl("get", "rob", "-o", "name").stdout == ""
    refused = ctl("delete", "rob", "r", check=False)
    assert "not found" in refused.stderr


def test_kubectl_shows_pods_and_jobs(ctl):
    containers = [{"name": "main", "image": "some", "command": ["true"]}]
    template = {"spec": {"restartPolicy": "Never", "containers": containers}}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "j"},
        "spec": {"template": template},
    }
    ctl("apply", "-f", "-", stdin=json.dumps(job))
    ctl("wait", "--for=jsonpath={.status.active}=1", "job/j", "--timeout=20s")
    assert ctl("get", "jobs").stdout.splitlines()[1].split()[:3] == ["j", "Running", "0/1"]
    assert ctl("get", "pods").stdout.splitlines()[1].split()[1:3] == ["0/1", "Pending"]
    assert "Completions:" in ctl("describe", "job", "j").stdout
    assert "Pending" in ctl("describe", "pods").stdout
    ctl("delete", "job", "j", "--timeout=30s")
    ctl("wait", "--for=delete", "pods", "--all", "--timeout=30s")


def test_kubectl_lists_resources_and_versions(robots, kubectl):
    assert "robots" in kubectl("api-resources", f"--api-group={GROUP}", "-o", "name").stdout
    assert "batch/v1" in kubectl("api-versions").stdout
    assert "Server Version: v1." in kubectl("version").stdout


# A kopf operator, in a process of its own

OPERATOR = f"""
import kopf

@kopf.on.create("{GROUP}", "v1", "robots")
def build(spec, patch, body, **_):
    kopf.info(body, reason="Built", message="built by the operator")
    patch.status["phase"] = f"built-{{spec['size']}}"

@kopf.on.update("{GROUP}", "v1", "robots", field="spec.size")
def rebuild(new, patch, **_):
    patch.status["phase"] = f"rebuilt-{{new}}"

@kopf.on.delete("{GROUP}", "v1", "robots")
def scrap(**_):
    pass
"""


@pytest.fixture
def operator(api, robots, namespace, tmp_path):
    """Runs the operator; its log must not tell of errors."""
    source = tmp_path / "operator.py"
    source.write_text(textwrap.dedent(OPERATOR))
    log = tmp_path / "operator.log"
    command = [sys.executable, "-m", "kopf", "run", f"--namespace={namespace}", str(source)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "KUBECONFIG": str(api.kubeconfig)},
        )
    yield log
    process.send_signal(signal.SIGINT)
    process.wait(timeout=30)
    assert "ERROR" not in log.read_text()


def test_an_unmodified_kopf_operator_runs(operator, http, namespace):
    robots = f"/apis/{GROUP}/v1/namespaces/{namespace}/robots"
    http.create(robots, json.loads(robot()))

    def has_phase(phase):
        return lambda answer: answer.body.get("status", {}).get("phase") == phase

    found = http.eventually(f"{robots}/r", has_phase("built-1")).body
    assert found["metadata"]["finalizers"] == ["kopf.zalando.org/KopfFinalizerMarker"]
    http.merge(f"{robots}/r", {"spec": {"size": 2}})
    http.eventually(f"{robots}/r", has_phase("rebuilt-2"))
    http.eventually(
        f"/api/v1/namespaces/{namespace}/events",
        lambda answer: "Built" in [each["reason"] for each in answer.body["items"]],
    )
    http("DELETE", f"{robots}/r")
    http.eventually(f"{robots}/r", lambda answer: answer.status == 404)


# The official Python client


@pytest.fixture
def client(api):
    with kubernetes.config.new_client_from_config(str(api.kubeconfig)) as client:
        yield client


def test_the_python_client_writes_and_reads(client, namespace):
    core = kubernetes.client.CoreV1Api(client)
    body = {"metadata": {"name": "c"}, "data": {"a": "b"}}
    created = core.create_namespaced_config_map(namespace, body)
    assert created.metadata.uid
    core.patch_namespaced_config_map("c", namespace, {"data": {"c": "d"}})
    assert core.read_namespaced_config_map("c", namespace).data == {"a": "b", "c": "d"}
    with pytest.raises(kubernetes.client.ApiException) as refused:
        core.create_namespaced_config_map(namespace, body)
    assert (refused.value.status, refused.value.reason) == (409, "Conflict")
    selected = core.list_namespaced_config_map(namespace, field_selector="metadata.name=c")
    assert [each.metadata.name for each in selected.items] == ["c"]
    core.delete_namespaced_config_map("c", namespace)


def test_the_python_client_handles_custom_objects(client, robots, namespace):
    custom = kubernetes.client.CustomObjectsApi(client)
    place = (GROUP, "v1", namespace, "robots")
    custom.create_namespaced_custom_object(*place, json.loads(robot()))
    status = {"status": {"phase": "Done"}}
    custom.patch_namespaced_custom_object_status(*place, "r", status)
    found = custom.get_namespaced_custom_object(*place, "r")
    assert found["status"]["phase"] == "Done"
    assert len(custom.list_namespaced_custom_object(*place)["items"]) == 1
    custom.delete_namespaced_custom_object(*place, "r")


def test_the_python_client_watches(client, namespace):
    core = kubernetes.client.CoreV1Api(client)
    since = core.list_namespaced_config_map(namespace).metadata.resource_version
    core.create_namespaced_config_map(namespace, {"metadata": {"name": "c"}})
    core.delete_namespaced_config_map("c", namespace)
    stream = kubernetes.watch.Watch().stream(
        core.list_namespaced_config_map, namespace, resource_version=since, timeout_seconds=1
    )
    events = [(each["type"], each["object"].metadata.name) for each in stream]
    assert [each for each in events if each[1] == "c"] == [("ADDED", "c"), ("DELETED", "c")]


def test_the_python_client_runs_jobs(client, namespace, http):
    batch = kubernetes.client.BatchV1Api(client)
    template = {
        "spec": {"restartPolicy": "Never", "containers": [{"name": "main", "image": "some"}]}
    }
    body = {"metadata": {"name": "j"}, "spec": {"template": template, "suspend": True}}
    job = batch.create_namespaced_job(namespace, body)
    assert job.spec.completions == 1
    batch.patch_namespaced_job("j", namespace, {"spec": {"suspend": False}})
    path = f"/apis/batch/v1/namespaces/{namespace}/jobs/j"
    http.eventually(path, lambda answer: answer.body["status"].get("active") == 1)
    batch.delete_namespaced_job("j", namespace, propagation_policy="Foreground")
    http.eventually(path, lambda answer: answer.status == 404)
