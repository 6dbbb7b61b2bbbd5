"""What the client sends, and what it makes of answers, silence and half answers."""

import base64
import json
import logging
import re
import socket
from pathlib import Path

import pytest

from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.config import ConfigError, load_access
from dpmoe_operator.kube.errors import (
    AlreadyExists,
    ApiError,
    Conflict,
    Forbidden,
    Gone,
    Invalid,
    NotFound,
    NotServed,
    OutcomeUnknown,
    Unauthorized,
    Unreachable,
)
from dpmoe_operator.kube.resources import (
    CONFIG_MAPS,
    LEDGER_ENTRIES,
    NODES,
    PODS,
    PRIVATE_BLOCKS,
    Resource,
)

from .conftest import (  # type: ignore[import-not-found]
    StubServer,
    access,
    drop,
    hang,
    ok,
    refusal,
    stream,
)


@pytest.mark.parametrize(
    ("resource", "arguments", "path"),
    [
        (PODS, ("a", "b", "status"), "/api/v1/namespaces/a/pods/b/status"),
        (PODS, (None,), "/api/v1/pods"),
        (NODES, (None, "n"), "/api/v1/nodes/n"),
        (PRIVATE_BLOCKS, ("a",), "/apis/dpmoe.dev/v1alpha1/namespaces/a/privateblocks"),
        (CONFIG_MAPS, ("a", "x/../y"), "/api/v1/namespaces/a/configmaps/x%2F..%2Fy"),
    ],
)
def test_paths(resource: Resource, arguments: tuple[str, ...], path: str) -> None:
    assert resource.path(*arguments) == path


@pytest.mark.parametrize("name", [(None, "p"), ("a", "")])
def test_a_path_never_widens_to_a_collection(name: tuple[str | None, str]) -> None:
    with pytest.raises(AssertionError):
        PODS.path(*name)


async def test_list_reads_all_pages_and_fills_in_kinds(
    stub: StubServer, client: KubeClient
) -> None:
    stub.script(
        ok({"metadata": {"resourceVersion": "7", "continue": "c1"}, "items": [{"metadata": {}}]}),
        ok({"metadata": {"resourceVersion": "7"}, "items": [{"spec": 2}]}),
    )
    items, version = await client.list(PODS, "ns", label_selector="a=b", field_selector="c=d")
    assert version == "7"
    assert items == [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {}},
        {"apiVersion": "v1", "kind": "Pod", "spec": 2},
    ]
    assert stub.seen[0].query == {"labelSelector": "a=b", "fieldSelector": "c=d", "limit": "500"}
    assert stub.seen[1].query["continue"] == "c1"


async def test_list_starts_over_when_its_pages_expire(stub: StubServer, client: KubeClient) -> None:
    stub.script(
        ok({"metadata": {"resourceVersion": "7", "continue": "c1"}, "items": [{"n": "stale"}]}),
        refusal(410, "Expired"),
        ok({"metadata": {"resourceVersion": "9"}, "items": [{"n": "fresh"}]}),
    )
    items, version = await client.list(PODS)
    assert ([item["n"] for item in items], version) == (["fresh"], "9")
    assert "limit" not in stub.seen[2].query


async def test_writes_are_strict_and_carry_what_was_given(
    stub: StubServer, client: KubeClient
) -> None:
    stub.script(ok({}))
    await client.create(CONFIG_MAPS, "ns", {"metadata": {"name": "x"}})
    await client.replace(CONFIG_MAPS, "ns", "x", {"a": 1}, subresource="status")
    await client.patch(PODS, "ns", "x", [{"op": "test"}], subresource="status", patch_type="json")
    await client.patch(PODS, "ns", "x", {"a": None}, patch_type="strategic")
    await client.delete(
        PODS,
        "ns",
        "x",
        precondition_uid="u",
        precondition_resource_version="5",
        grace_seconds=0,
    )
    create, replace, json_patch, strategic, delete = stub.seen
    for write in (create, replace, json_patch, strategic):
        assert write.query == {"fieldManager": "dpmoe", "fieldValidation": "Strict"}
    assert (create.method, replace.method) == ("POST", "PUT")
    assert replace.path.endswith("/configmaps/x/status")
    assert json_patch.headers["Content-Type"] == "application/json-patch+json"
    assert json.loads(json_patch.body) == [{"op": "test"}]
    assert strategic.headers["Content-Type"] == "application/strategic-merge-patch+json"
    assert json.loads(strategic.body) == {"a": None}
    assert json.loads(delete.body) == {
        "apiVersion": "v1",
        "kind": "DeleteOptions",
        "propagationPolicy": "Background",
        "preconditions": {"uid": "u", "resourceVersion": "5"},
        "gracePeriodSeconds": 0,
    }


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (404, "NotFound", NotFound),
        (409, "AlreadyExists", AlreadyExists),
        (409, "Conflict", Conflict),
        (403, "Forbidden", Forbidden),
        (401, "Unauthorized", Unauthorized),
        (422, "Invalid", Invalid),
        (410, "Expired", Gone),
        (410, "Gone", Gone),
        (400, "BadRequest", ApiError),
        (429, "TooManyRequests", ApiError),
    ],
)
async def test_refusals_have_their_kind(
    stub: StubServer, client: KubeClient, code: int, reason: str, kind: type[ApiError]
) -> None:
    stub.script(refusal(code, reason, "because"))
    with pytest.raises(ApiError, match="because") as caught:
        await client.create(PODS, "ns", {})
    assert type(caught.value) is kind
    assert (caught.value.status, caught.value.reason) == (code, reason)


async def test_an_unknown_kind_is_not_a_missing_object(
    stub: StubServer, client: KubeClient
) -> None:
    stub.script(refusal(404, "NotFound", "the server could not find the requested resource"))
    with pytest.raises(NotServed, match="install the CRDs") as caught:
        await client.get(LEDGER_ENTRIES, "ns", "entry-000000000001")
    assert not isinstance(caught.value, NotFound)


@pytest.mark.parametrize("fault", [drop(), hang(), refusal(500, "InternalError"), ok("not json")])
async def test_a_write_without_a_clear_answer_is_sent_once(
    stub: StubServer, client: KubeClient, fault: object
) -> None:
    stub.script(fault)
    with pytest.raises(OutcomeUnknown):
        await client.create(LEDGER_ENTRIES, "ns", {})
    assert len(stub.seen) == 1
    with pytest.raises(OutcomeUnknown):
        await client.patch(LEDGER_ENTRIES, "ns", "x", {})
    assert len(stub.seen) == 2


async def test_a_write_that_could_not_connect_did_not_happen(naps: list[float]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        async with KubeClient(access(url)) as client:
            with pytest.raises(Unreachable, match=re.escape(url)) as caught:
                await client.create(PODS, "ns", {})
    assert not isinstance(caught.value, OutcomeUnknown)
    assert "the test" in str(caught.value)


@pytest.mark.parametrize(
    "fault", [hang(), refusal(503, "ServiceUnavailable"), refusal(429, "TooManyRequests")]
)
async def test_a_read_is_tried_again(
    stub: StubServer, client: KubeClient, naps: list[float], fault: object
) -> None:
    stub.script(fault, ok({"found": True}))
    assert await client.get(PODS, "ns", "x") == {"found": True}
    assert len(naps) == 1


async def test_a_read_survives_a_dropped_connection(stub: StubServer, client: KubeClient) -> None:
    stub.script(drop(), ok({"found": True}))
    assert await client.get(PODS, "ns", "x") == {"found": True}


async def test_reads_give_up_and_honour_retry_after(
    stub: StubServer, client: KubeClient, naps: list[float]
) -> None:
    stub.script(refusal(429, "TooManyRequests", "busy", Retry_After="3"))
    with pytest.raises(ApiError, match="busy"):
        await client.get(PODS, "ns", "x")
    assert len(stub.seen) == 5
    assert [nap >= 3 for nap in naps] == [True] * 4


async def test_a_refused_read_is_not_tried_again(stub: StubServer, client: KubeClient) -> None:
    stub.script(refusal(403, "Forbidden"))
    with pytest.raises(Forbidden):
        await client.get(PODS, "ns", "x")
    assert len(stub.seen) == 1


async def test_credentials_are_read_again_when_the_server_no_longer_takes_them(
    stub: StubServer,
) -> None:
    tokens = iter(["Bearer old", "Bearer new"])
    stub.script(refusal(401, "Unauthorized"), ok({}))
    async with KubeClient(access(stub.url, lambda: next(tokens))) as client:
        await client.create(PODS, "ns", {})
        await client.get(PODS, "ns", "x")
    sent = [seen.headers["Authorization"] for seen in stub.seen]
    assert sent == ["Bearer old", "Bearer new", "Bearer new"]


async def test_nothing_secret_is_logged(stub: StubServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    stub.script(refusal(503, "ServiceUnavailable"))

    async def nap(_: float) -> None: ...

    # The embedded server takes its token as part of the address, too.
    opened = access(f"{stub.url}/hush-path", lambda: "Bearer hush-token")
    async with KubeClient(opened, sleep=nap) as client:
        with pytest.raises(Unreachable) as read:
            await client.get(PODS, "ns", "x")
        stub.script(drop())
        with pytest.raises(OutcomeUnknown) as write:
            await client.create(PODS, "ns", {"data": "hush-body"})
    assert "again in" in caplog.text
    assert stub.url in str(write.value)
    for text in (caplog.text, str(read.value), str(write.value), repr(opened)):
        assert "hush" not in text


async def test_watch_yields_events_however_they_are_cut(
    stub: StubServer, client: KubeClient
) -> None:
    big = {"type": "ADDED", "object": {"metadata": {"name": "x" * 300_000}}}
    bookmark = {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "9"}}}
    text = (json.dumps(big) + "\n" + json.dumps(bookmark) + "\n").encode()
    stub.script(stream(text[:10], text[10:200_000], text[200_000:]))
    events = [event async for event in client.watch(PODS, "ns", resource_version="4")]
    assert [type_ for type_, _ in events] == ["ADDED", "BOOKMARK"]
    assert events[0][1] == big["object"]
    assert stub.seen[0].query == {
        "watch": "true",
        "allowWatchBookmarks": "true",
        "timeoutSeconds": "300",
        "resourceVersion": "4",
    }


async def test_watch_reports_expiry_and_silence(stub: StubServer, client: KubeClient) -> None:
    status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}
    stub.script(stream(json.dumps({"type": "ERROR", "object": status}).encode() + b"\n"))
    with pytest.raises(Gone, match="too old"):
        _ = [event async for event in client.watch(PODS)]
    stub.script(stream(b"", then_hang=True))
    with pytest.raises(Unreachable):
        _ = [event async for event in client.watch(PODS, silence_seconds=0.2)]


async def test_logs_come_line_by_line(stub: StubServer, client: KubeClient) -> None:
    stub.script(stream(b"one\ntw", b"o\nthree"))
    lines = [line async for line in client.logs("ns", "p", container="c", tail_lines=3)]
    assert lines == ["one", "two", "three"]
    assert stub.seen[0].path == "/api/v1/namespaces/ns/pods/p/log"
    assert stub.seen[0].query == {"container": "c", "tailLines": "3"}


KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: one
clusters:
- {name: c1, cluster: {server: "http://one:1"}}
- {name: c2, cluster: {server: "http://two:2/"}}
users:
- {name: u1, user: {token: first}}
- {name: u2, user: {exec: {apiVersion: client.authentication.k8s.io/v1, command: sh, args: SCRIPT}}}
contexts:
- {name: one, context: {cluster: c1, user: u1}}
- {name: two, context: {cluster: c2, user: u2, namespace: team}}
"""


def test_kubeconfig_contexts_tokens_and_plugins(tmp_path: Path) -> None:
    credential = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {"token": "from-plugin"},
    }
    script = json.dumps(["-c", f"echo '{json.dumps(credential)}'"])
    path = tmp_path / "config"
    path.write_text(KUBECONFIG.replace("SCRIPT", script))
    one, two = load_access(path), load_access(path, "two")
    assert (one.server, one.namespace, one.authorization()) == (
        "http://one:1",
        "default",
        "Bearer first",
    )
    assert (two.server, two.namespace, two.authorization()) == (
        "http://two:2",
        "team",
        "Bearer from-plugin",
    )
    path.write_text(path.read_text().replace("first", "second"))
    assert one.reload().authorization() == "Bearer second"


@pytest.mark.parametrize(
    ("text", "context"),
    [("", None), ("[", None), (KUBECONFIG.replace("SCRIPT", "[]"), "three")],
)
def test_an_unusable_kubeconfig_is_named(tmp_path: Path, text: str, context: str | None) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        load_access(path, context)
    with pytest.raises(ConfigError, match="dpmoe demo"):
        load_access(tmp_path / "missing")


def test_unusable_certificates_are_named(tmp_path: Path) -> None:
    junk = base64.b64encode(b"junk").decode()
    cluster = f'{{server: "https://one:1", certificate-authority-data: {junk}}}'
    text = KUBECONFIG.replace('{server: "http://one:1"}', cluster).replace("SCRIPT", "[]")
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(ConfigError, match="certificate-authority"):
        load_access(path)


def test_a_rotated_service_account_token_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kubernetes.config.incluster_config as incluster

    from dpmoe_operator.kube import config

    authority = Path(__file__).with_name("authority.pem")
    for name, text in (
        ("token", "first\n"),
        ("ca.crt", authority.read_text()),
        ("namespace", "op"),
    ):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(incluster, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setattr(config, "SERVICE_ACCOUNT", tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    monkeypatch.delenv("KUBECONFIG", raising=False)
    found = load_access()
    assert (found.server, found.namespace) == ("https://10.0.0.1:443", "op")
    assert found.authorization() == "Bearer first"
    (tmp_path / "token").write_text("second")
    assert found.reload().authorization() == "Bearer second"
