"""Several real operators in one cluster: each a process that can be stopped, delayed and misled."""

import asyncio
import fcntl
import os
import signal
import ssl
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web
from tests.cluster.conftest import ApiServer, RawClient
from tests.cluster.world import OWNER, TEAM, Object, World, job

from dpmoe_operator.ledger.anchor import Anchor
from dpmoe_operator.ledger.fold import LedgerState, fold
from dpmoe_operator.local.processes import Child
from dpmoe_operator.local.stack import TRAINER_IMAGE

LEASE_SECONDS = 3
SKEWED = Path(__file__).with_name("skewed_clock.py")
PLAIN = ("-m", "dpmoe_operator.cli.main")


class Operator:
    """An operator process."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._ended = False
        child.start()
        pid = child.pid
        assert pid is not None, child.last_lines()
        self.pid = pid

    @property
    def well(self) -> bool:
        """Whether it has not ended by itself."""
        return self._ended or self._child.exit_code is None

    @property
    def log(self) -> str:
        """What it wrote about itself."""
        return self._child.log.read_text(errors="replace")

    def is_named(self, identity: str) -> bool:
        """Whether an identity, of a lease or of an entry's writer, is this process'."""
        return f"-{self.pid}-" in identity

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """It stands still, as a process on a starved or frozen node does."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL."""
        self._ended = True
        os.kill(self.pid, signal.SIGKILL)
        self._child.stop()

    def stop(self) -> None:
        """SIGTERM, and wait."""
        self._ended = True
        self._child.stop()


class Arena:
    """A ledger of its own in a cluster that others may use too, and the operators that share it."""

    def __init__(self, world: World, directory: Path) -> None:
        self.world = world
        self.namespace = f"ledger-{uuid.uuid4().hex[:8]}"
        self.operators: list[Operator] = []
        self._directory = directory
        self._anchor = directory / "anchor"
        self._anchor.mkdir()
        self._http = RawClient(server_of(world.stack.kubeconfig))
        world.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}})

    def start(
        self,
        *,
        kubeconfig: Path | None = None,
        skew: float = 0.0,
        lease_seconds: int = LEASE_SECONDS,
        pod_uid: str | None = None,
    ) -> Operator:
        """Start an operator; with `skew`, its wall clock is off by so many seconds."""
        launcher = (str(SKEWED), str(skew)) if skew else PLAIN
        flags = {
            "namespace": self.namespace,
            "trainer-image": TRAINER_IMAGE,
            "anchor": str(self._anchor),
            "lease-seconds": str(lease_seconds),
            "round-seconds": "1",
        }
        if pod_uid is not None:
            flags["pod-uid"] = pod_uid
        name = f"operator-{len(self.operators)}"
        child = Child(
            name,
            [
                sys.executable,
                *launcher,
                "operator",
                *(part for flag, value in flags.items() for part in (f"--{flag}", value)),
            ],
            log=self._directory / f"{name}.log",
            env={
                **os.environ,
                "PYTHONUNBUFFERED": "1",
                "KUBECONFIG": str(kubeconfig or self.world.stack.kubeconfig),
            },
        )
        operator = Operator(child)
        self.operators.append(operator)
        return operator

    def ask(self, *names: str, of: str = "notes", epsilon: str = "0.5") -> None:
        """Apply small jobs, all on one block."""
        self.world.apply(
            *(
                job(
                    name,
                    blocks={"namespace": OWNER, "names": [of]},
                    privacy={"epsilon": epsilon, "delta": "1e-5", "clippingNorm": "1"},
                )
                for name in names
            )
        )

    def entries(self) -> list[Object]:
        """The ledger's entries by name."""
        listed = self._http.get(
            f"/apis/dpmoe.dev/v1alpha1/namespaces/{self.namespace}/ledgerentries"
        )
        return sorted(listed["items"], key=lambda entry: str(entry["metadata"]["name"]))

    def records(self, kind: str) -> list[Object]:
        """All records of a kind in the ledger, in order."""
        return [r[kind] for entry in self.entries() for r in entry["spec"]["records"] if kind in r]

    def granted(self) -> set[str]:
        """Names of the jobs that have budget."""
        return {granted["job"]["name"] for granted in self.records("granted")}

    def holder(self) -> str:
        """Who holds the lease; nobody is the empty string."""
        leases = f"/apis/coordination.k8s.io/v1/namespaces/{self.namespace}/leases"
        return "".join(lease["spec"]["holderIdentity"] for lease in self._http.get(leases)["items"])

    def states(self) -> list[str]:
        """The state of each job; empty where nobody said anything about it yet."""
        listed = self._http.get(f"/apis/dpmoe.dev/v1alpha1/namespaces/{TEAM}/dpmoejobs")
        return [(job.get("status") or {}).get("state", "") for job in listed["items"]]

    def leads(self, operator: Operator) -> bool:
        """Whether the lease names an operator."""
        return operator.is_named(self.holder())

    def until_granted(self, *names: str) -> None:
        """Wait until these jobs have budget."""
        self.until(lambda: self.granted() >= set(names), f"{', '.join(names)} have budget")

    def until_quiet(self) -> None:
        """Wait until all that was granted is launched, and nobody writes to log or anchor."""

        def quiet() -> bool:
            copied = sum(1 for _ in Anchor(self._anchor).entries())
            written = len(self.entries())
            launched = len(self.records("launched")) == len(self.records("granted"))
            return launched and copied == written and self._anchor_is_free()

        self.until(quiet, "all is launched")

    def _anchor_is_free(self) -> bool:
        with (self._anchor / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    def until(self, holds: Callable[[], Any], what: str, *, seconds: float = 30) -> Any:
        """Wait until something holds, while all operators live; what it returned."""
        deadline = time.monotonic() + seconds
        while not (found := holds()):
            assert all(operator.well for operator in self.operators), self._logs()
            assert time.monotonic() < deadline, f"never: {what}\n{self._logs()}"
            time.sleep(0.1)
        return found

    def check(self) -> LedgerState:
        """That the log is one chain, keeps its budget, and begins with what the anchor holds."""
        copied = [copy["spec"]["digest"] for copy in Anchor(self._anchor).entries()]
        entries = self.entries()
        assert copied == [entry["spec"]["digest"] for entry in entries][: len(copied)]
        state = fold(entries)
        jobs = [granted["job"]["uid"] for granted in self.records("granted")]
        assert len(jobs) == len(set(jobs)), "a job was granted twice"
        for opened in self.records("accountOpened"):
            assert self._spent_within(opened), f"{opened['account']} is overspent"
        return state

    def _spent_within(self, opened: Object) -> bool:
        """Whether what is reserved or consumed stays within the capacity at some order."""
        spent = [0] * len(opened["capacity"])
        settled = {s["job"]["uid"]: s for s in self.records("settled")}
        for granted in self.records("granted"):
            for charge in settled.get(granted["job"]["uid"], granted)["charges"]:
                if charge["account"] == opened["account"]:
                    spent = [a + b for a, b in zip(spent, charge["amounts"], strict=True)]
        return any(s <= c for s, c in zip(spent, opened["capacity"], strict=True))

    def close(self) -> None:
        """Stop the operators, and leave the cluster as it was."""
        for operator in self.operators:
            operator.stop()
        for kinds, namespace in (("dpmoejobs", TEAM), ("privateblocks,jobs", OWNER)):
            self.world.stack.kubectl("delete", kinds, "--all", "-n", namespace, "--wait=false")

    def _logs(self) -> str:
        return "\n".join(
            f"--- {operator.pid}\n" + "\n".join(operator.log.splitlines()[-20:])
            for operator in self.operators
        )


def server_of(kubeconfig: Path) -> ApiServer:
    """The API server that a kubeconfig names."""
    config = yaml.safe_load(kubeconfig.read_text())
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    authority = cluster.get("certificate-authority")
    return ApiServer(
        name="",
        url=cluster["server"].rstrip("/"),
        token=user["token"],
        kubeconfig=kubeconfig,
        ca_file=Path(authority) if authority else None,
    )


class Gate:
    """A way to the API server on which the next entry of the ledger can be held back.

    Attributes:
        kubeconfig: for whoever takes this way.
        arrived: set once an entry waits at the gate.
        answers: the server's answers to entries that had waited.
    """

    def __init__(self, kubeconfig: Path, own: Path) -> None:
        self.kubeconfig = own
        self.arrived = threading.Event()
        self.answers: list[int] = []
        self._closed = False
        self._open: asyncio.Event
        self._ready = threading.Event()
        server = server_of(kubeconfig)
        self._server, authority = server.url, server.ca_file
        self._ssl = ssl.create_default_context(cafile=authority) if authority else None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        config = yaml.safe_load(kubeconfig.read_text())
        config["clusters"][0]["cluster"] = {"server": self._url}
        own.write_text(yaml.safe_dump(config))

    def close(self) -> None:
        """Hold back the next entry that somebody sends."""
        self._closed = True

    def open(self) -> int:
        """Let the entry that waits go on, however late; the server's answer to it."""
        count = len(self.answers)
        self._loop.call_soon_threadsafe(self._open.set)
        deadline = time.monotonic() + 10
        while len(self.answers) == count:
            assert time.monotonic() < deadline, "the server did not answer"
            time.sleep(0.02)
        return self.answers[-1]

    def end(self) -> None:
        """Close all connections."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._open = asyncio.Event()
        runner = self._loop.run_until_complete(self._listen())
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.run_until_complete(self._session.close())
        self._loop.close()

    async def _listen(self) -> web.AppRunner:
        self._session = aiohttp.ClientSession(
            auto_decompress=False, timeout=aiohttp.ClientTimeout(total=None)
        )
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self._url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        """One request, and the answer as it comes. A sender that is gone stops nothing."""
        body = await request.read()
        held = self._closed and request.method == "POST" and request.path.endswith("ledgerentries")
        if held:
            self._closed = False
            self._open.clear()
            self.arrived.set()
            await self._open.wait()
        kept = ("Authorization", "Content-Type", "Accept", "User-Agent")
        headers = {name: request.headers[name] for name in kept if name in request.headers}
        async with self._session.request(
            request.method,
            self._server + request.path_qs,
            data=body or None,
            headers=headers | {"Accept-Encoding": "identity"},
            ssl=self._ssl or True,
        ) as answer:
            response = web.StreamResponse(status=answer.status)
            response.headers["Content-Type"] = answer.headers.get("Content-Type", "text/plain")
            if held:
                self.answers.append(answer.status)
            try:
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
            except ConnectionError:
                return response
        return response
