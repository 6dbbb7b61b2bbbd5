"""What a local process gets to see: its variables, its arguments, its files."""

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpmoe_operator.kube.client import Object
from dpmoe_operator.kube.resources import (
    CONFIG_MAPS,
    PERSISTENT_VOLUME_CLAIMS,
    SECRETS,
    Resource,
)
from dpmoe_operator.local.runner.environment import Place, build, declared
from dpmoe_operator.local.runner.expansion import expand
from dpmoe_operator.local.runner.images import Image, load_images
from dpmoe_operator.local.runner.ports import Ports
from dpmoe_operator.local.runner.sources import NotReady, Sources
from dpmoe_operator.local.runner.volumes import PodFolder

IMAGE = Image(("python", "-m", "trainer"), {"FROM_IMAGE": "1", "OVERRIDDEN": "image"})


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


OBJECTS: dict[tuple[Resource, str], Object] = {
    (CONFIG_MAPS, "plan"): {"data": {"plan.json": "{}", "OK_KEY": "yes"}},
    (SECRETS, "login"): {"data": {"user": b64("ann"), "password": b64("hush")}},
    (PERSISTENT_VOLUME_CLAIMS, "data"): {},
}


def make_sources(container: Object, volumes: list[Object] | None = None) -> Sources:
    pod = {
        "metadata": {
            "namespace": "ns",
            "name": "pod-0",
            "uid": "u-1",
            "labels": {"app.kubernetes.io/x": "label"},
            "annotations": {"batch.kubernetes.io/job-completion-index": "3"},
        },
        "spec": {"containers": [container], "volumes": volumes or [], "nodeName": "local"},
    }
    return Sources(pod, OBJECTS)


def field(path: str) -> Object:
    return {"fieldRef": {"fieldPath": path}}


def env(*variables: tuple[str, Any]) -> Object:
    entries = [
        {"name": name, "value": value} if isinstance(value, str) else {"name": name} | value
        for name, value in variables
    ]
    return {"name": "main", "image": "i", "env": entries}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("$(A)", "x"),
        ("a$(A)b$(A)", "axbx"),
        ("$(MISSING)", "$(MISSING)"),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$x"),
        ("$A ${A} $(A", "$A ${A} $(A"),
    ],
)
def test_expansion_follows_kubernetes(text: str, wanted: str) -> None:
    assert expand(text, {"A": "x"}) == wanted


def test_declared_variables_are_resolved_in_order() -> None:
    container = env(
        ("NAME", {"valueFrom": field("metadata.name")}),
        ("UID", {"valueFrom": field("metadata.uid")}),
        ("LABEL", {"valueFrom": field("metadata.labels['app.kubernetes.io/x']")}),
        (
            "RANK",
            {
                "valueFrom": field(
                    "metadata.annotations['batch.kubernetes.io/job-completion-index']"
                )
            },
        ),
        ("ABSENT", {"valueFrom": field("metadata.labels['nope']")}),
        ("IP", {"valueFrom": field("status.podIP")}),
        ("PASSWORD", {"valueFrom": {"secretKeyRef": {"name": "login", "key": "password"}}}),
        ("PLAN", {"valueFrom": {"configMapKeyRef": {"name": "plan", "key": "plan.json"}}}),
        ("OPTIONAL", {"valueFrom": {"secretKeyRef": {"name": "x", "key": "y", "optional": True}}}),
        ("BOTH", "$(NAME):$(LATER)"),
        ("LATER", "z"),
    )
    container["envFrom"] = [{"prefix": "P_", "configMapRef": {"name": "plan"}}]
    assert declared(container, make_sources(container)) == {
        "P_plan.json": "{}",
        "P_OK_KEY": "yes",
        "NAME": "pod-0",
        "UID": "u-1",
        "LABEL": "label",
        "RANK": "3",
        "ABSENT": "",
        "IP": "127.0.0.1",
        "PASSWORD": "hush",
        "PLAN": "{}",
        "BOTH": "pod-0:$(LATER)",
        "LATER": "z",
    }


@pytest.mark.parametrize(
    "origin",
    [
        {"secretKeyRef": {"name": "nobody", "key": "k"}},
        {"secretKeyRef": {"name": "login", "key": "nothing"}},
        {"configMapKeyRef": {"name": "nobody", "key": "k"}},
        {"fieldRef": {"fieldPath": "spec.unheard"}},
        {"resourceFieldRef": {"resource": "limits.cpu"}},
    ],
)
def test_what_is_missing_or_unsupported_is_never_guessed(origin: Object) -> None:
    container = env(("X", {"valueFrom": origin}))
    with pytest.raises(NotReady):
        declared(container, make_sources(container))


def test_the_environment_is_built_from_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    container = env(
        ("OVERRIDDEN", "pod"),
        ("HOME", "/tmp"),
        ("PET_MASTER_ADDR", "job-0.job"),
        ("PET_MASTER_PORT", "29500"),
        ("DPMOE_PROGRESS_PORT", "8475"),
        ("ADDRESS", "$(PET_MASTER_ADDR):$(PET_MASTER_PORT)"),
    )
    container["resources"] = {"limits": {"cpu": "1500m"}}
    place = Place(tmp_path / "root", tmp_path / "tmp", progress_port=4001, master_port=4002)
    assert build(container, IMAGE, make_sources(container), place) == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "HOSTNAME": "pod-0",
        "OMP_NUM_THREADS": "2",
        "FROM_IMAGE": "1",
        "OVERRIDDEN": "pod",
        "HOME": str(tmp_path / "root/tmp"),
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": "4002",
        "DPMOE_PROGRESS_PORT": "4001",
        "ADDRESS": "127.0.0.1:4002",
        "TMPDIR": str(tmp_path / "tmp"),
        "DPMOE_ROOT": str(tmp_path / "root"),
    }


def test_a_pod_without_rendezvous_gets_none(tmp_path: Path) -> None:
    place = Place(tmp_path, tmp_path, progress_port=4001, master_port=None)
    built = build(env(), IMAGE, make_sources(env()), place)
    assert not [name for name in built if name.startswith("PET_")]
    assert built["DPMOE_PROGRESS_PORT"] == "4001"


@pytest.mark.parametrize(
    ("container", "argv"),
    [
        ({}, ["python", "-m", "trainer"]),
        ({"args": ["--x", "$(A)"]}, ["python", "-m", "trainer", "--x", "1"]),
        ({"command": ["sh", "-c"], "args": ["echo"]}, ["sh", "-c", "echo"]),
        ({"command": ["$(A)"]}, ["1"]),
    ],
)
def test_command_replaces_the_entry_point(container: Object, argv: list[str]) -> None:
    assert IMAGE.argv(container, {"A": "1"}) == argv


@pytest.mark.parametrize(
    "table",
    [
        "{",
        "[]",
        '{"a": []}',
        '{"a": {}}',
        '{"a": {"command": "x"}}',
        '{"a": {"command": [1]}}',
        '{"a": {"command": ["x"], "entrypoint": []}}',
        '{"a": {"command": ["x"], "env": {"A": 1}}}',
    ],
)
def test_a_wrong_image_table_is_named(tmp_path: Path, table: str) -> None:
    path = tmp_path / "images.json"
    path.write_text(table)
    with pytest.raises(ValueError, match=r"images\.json"):
        load_images(path)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[PodFolder]:
    made = PodFolder(tmp_path / "pod", tmp_path / "claims")
    made.create()
    yield made
    made.remove()


def test_volumes_appear_where_they_are_mounted(folder: PodFolder, tmp_path: Path) -> None:
    host = tmp_path / "host"
    host.mkdir()
    (host / "corpus.csv").write_text("rows")
    projected = {
        "sources": [
            {"configMap": {"name": "plan", "items": [{"key": "plan.json", "path": "a/b.json"}]}},
            {"secret": {"name": "login"}},
            {"serviceAccountToken": {"path": "token"}},
            {"downwardAPI": {"items": [{"path": "labels"} | field("metadata.labels")]}},
        ]
    }
    volumes = [
        {"name": "plan", "configMap": {"name": "plan"}},
        {"name": "login", "secret": {"secretName": "login", "defaultMode": 0o400}},
        {"name": "scratch", "emptyDir": {}},
        {"name": "data", "persistentVolumeClaim": {"claimName": "data", "readOnly": True}},
        {"name": "host", "hostPath": {"path": str(host), "type": "Directory"}},
        {"name": "all", "projected": projected},
    ]
    mounts = [
        {"name": "plan", "mountPath": "/etc/plan"},
        {"name": "login", "mountPath": "/etc/login"},
        {"name": "scratch", "mountPath": "/tmp"},
        {"name": "data", "mountPath": "/data", "readOnly": True},
        {"name": "data", "mountPath": "/part", "subPathExpr": "parts/$(PART)"},
        {"name": "host", "mountPath": "/corpus.csv", "subPath": "corpus.csv"},
        {"name": "all", "mountPath": "/all"},
    ]
    container = {"name": "main", "image": "i", "volumeMounts": mounts}
    root = folder.lay_out(container, make_sources(container, volumes), {"PART": "p1"})
    assert (root / "etc/plan/plan.json").read_text() == "{}"
    assert (root / "etc/login/password").read_text() == "hush"
    assert (root / "etc/login/password").stat().st_mode & 0o777 == 0o400
    assert (root / "data").resolve() == tmp_path / "claims/data"
    assert (root / "part").resolve() == tmp_path / "claims/data/parts/p1"
    assert (root / "corpus.csv").read_text() == "rows"
    assert (root / "all/a/b.json").read_text() == "{}"
    assert (root / "all/user").read_text() == "ann"
    assert (root / "all/labels").read_text() == 'app.kubernetes.io/x="label"'
    assert not (root / "all/token").exists()
    assert (root / "dev/termination-log").read_text() == ""
    (root / "tmp/note").write_text("kept over a restart of the container")
    (root / "data/out").write_text("result")
    (root / "dev/termination-log").write_text("old")
    root = folder.lay_out(container, make_sources(container, volumes), {"PART": "p1"})
    assert (root / "tmp/note").exists()
    assert (root / "dev/termination-log").read_text() == ""
    folder.remove()
    assert not folder.path.exists()
    assert (tmp_path / "claims/data/out").read_text() == "result"
    assert (host / "corpus.csv").exists()


def test_temporary_files_have_short_private_paths(folder: PodFolder) -> None:
    container = {"name": "main", "image": "i"}
    root = folder.lay_out(container, make_sources(container), {})
    assert (root / "tmp").resolve() == folder.temporary
    assert folder.temporary.stat().st_mode & 0o077 == 0
    # A socket's path has at most 108 bytes, and multiprocessing adds about 32.
    assert len(str(folder.temporary)) < 70
    temporary = folder.temporary
    folder.remove()
    assert not temporary.exists()


@pytest.mark.parametrize(
    ("volume", "mount"),
    [
        ({"configMap": {"name": "nobody"}}, {"mountPath": "/v"}),
        (
            {"configMap": {"name": "plan", "items": [{"key": "x", "path": "x"}]}},
            {"mountPath": "/v"},
        ),
        (
            {"configMap": {"name": "plan", "items": [{"key": "OK_KEY", "path": "../../x"}]}},
            {"mountPath": "/v"},
        ),
        ({"secret": {"secretName": "nobody"}}, {"mountPath": "/v"}),
        ({"persistentVolumeClaim": {"claimName": "nobody"}}, {"mountPath": "/v"}),
        ({"hostPath": {"path": "/nowhere/at/all"}}, {"mountPath": "/v"}),
        ({"nfs": {"server": "s", "path": "/"}}, {"mountPath": "/v"}),
        ({"emptyDir": {}}, {"mountPath": "/../../escape"}),
        ({"emptyDir": {}}, {"mountPath": "/"}),
        ({"emptyDir": {}}, {"mountPath": "/v", "subPath": "../../x"}),
        ({"emptyDir": {}}, {"mountPath": "/v", "name": "undeclared"}),
    ],
)
def test_a_volume_that_can_not_be_is_refused(
    folder: PodFolder, volume: Object, mount: Object
) -> None:
    container = {"name": "main", "image": "i", "volumeMounts": [{"name": "v"} | mount]}
    with pytest.raises(NotReady):
        folder.lay_out(container, make_sources(container, [{"name": "v"} | volume]), {})


def test_mounts_inside_of_mounts_are_refused(folder: PodFolder) -> None:
    mounts = [{"name": "v", "mountPath": "/a/b"}, {"name": "v", "mountPath": "/a"}]
    container = {"name": "main", "image": "i", "volumeMounts": mounts}
    with pytest.raises(NotReady, match="mounts inside of mounts"):
        folder.lay_out(container, make_sources(container, [{"name": "v", "emptyDir": {}}]), {})


def test_termination_messages(folder: PodFolder, tmp_path: Path) -> None:
    container = {"name": "main", "image": "i"}
    folder.lay_out(container, make_sources(container), {})
    log = "before\n" + "\n".join(f"line {i}" for i in range(200))
    folder.log.write_text(log)
    start = len("before\n")
    assert folder.termination_message(container, True, start) == ""
    container["terminationMessagePolicy"] = "FallbackToLogsOnError"
    assert folder.termination_message(container, False, start) == ""
    fallback = folder.termination_message(container, True, start)
    assert fallback.splitlines() == [f"line {i}" for i in range(120, 200)]
    assert folder.termination_message(container, True, len(log) - 3) == "199"
    message = folder.termination_log(container)
    message.write_text("x" * 100 + "y" * 4096)
    assert folder.termination_message(container, True, start) == "y" * 4096
    secret = tmp_path / "secret"
    secret.write_text("hush")
    message.unlink()
    message.symlink_to(secret)
    assert "hush" not in folder.termination_message(container, True, start)


def test_ports_are_shared_by_name_and_given_back() -> None:
    ports = Ports()
    first = ports.hold("ns/job-0.job", "pod-0")
    assert ports.hold("ns/job-0.job", "pod-1") == first
    others = {ports.hold(f"progress of {i}", f"pod-{i}") for i in range(20)}
    assert len(others) == 20
    assert first not in others
    ports.release("pod-0")
    assert ports.hold("ns/job-0.job", "pod-2") == first
    for pod in ("pod-1", "pod-2"):
        ports.release(pod)
    assert "ns/job-0.job" not in ports._leases


def test_nothing_of_this_process_is_in_the_environment(tmp_path: Path) -> None:
    place = Place(tmp_path, tmp_path, progress_port=4001, master_port=None)
    built = build(env(), Image(("x",), {}), make_sources(env()), place)
    made_up = {"PATH", "HOME", "LANG", "HOSTNAME", "TMPDIR", "DPMOE_ROOT", "DPMOE_PROGRESS_PORT"}
    assert set(built) == made_up
    assert built["PATH"] != os.environ["PATH"]
