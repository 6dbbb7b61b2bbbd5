"""How far a run is: counted once, shown on a terminal and served to the operator over HTTP.

What is served is public by the plan: the step, the ε spent by then, and the speed. Nothing here
is computed from the data, and no loss ever passes through. The speed is the mean over the run so
far, since the time of a single step would tell the size of its sample.
"""

import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Literal

from tqdm import tqdm

from dpmoe_trainer.contract import Environment, Progress
from dpmoe_trainer.errors import BadPlan

Phase = Literal["Loading", "Training", "Evaluating", "Saving", "Done"]


class ProgressBoard:
    """The run's one count of steps; the loop writes it, the report and the endpoint read it.

    Args:
        steps: steps of the plan.
        epsilon: ε that the mechanism has cost after so many steps.
        clock: seconds, monotonic.
        beat: called at every sign of progress.
    """

    def __init__(
        self,
        steps: int,
        epsilon: Callable[[int], float],
        clock: Callable[[], float] = time.monotonic,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.steps = steps
        self.drawn = 0
        """Steps whose draw was begun: each is spent, whether or not its update was made."""
        # Remembered, since the operator asks more often than steps are made.
        self._epsilon = lru_cache(maxsize=8)(epsilon)
        self._clock = clock
        self.beat = beat
        self._resumed = 0
        self._phase: Phase = "Loading"
        self._started: float | None = None
        self._finished = 0
        self._speed = 0.0
        self._bar: tqdm | None = None

    def enter(self, phase: Phase) -> None:
        """Moves on to the next phase."""
        self.beat()
        self._phase = phase
        if phase == "Training":
            self._started = self._clock()
            # disable=None: only on a terminal.
            self._bar = tqdm(
                total=self.steps,
                initial=self._resumed,
                desc="steps",
                file=sys.stderr,
                disable=None,
            )
        elif self._bar is not None:
            self._bar.close()
            self._bar = None

    def resume(self, step: int, drawn: int) -> None:
        """Goes on after `step` steps, of a run that drew `drawn`."""
        self._resumed, self.drawn = step, drawn

    def count_draw(self) -> None:
        """Counts a step as spent; called before its sample is drawn."""
        self.beat()
        self.drawn += 1

    def count_update(self) -> None:
        """Counts a step as done."""
        assert self._started is not None, "updates happen in the phase Training"
        self.beat()
        self._finished += 1
        self._speed = self._finished / max(self._clock() - self._started, 1e-9)
        if self._bar is not None:
            self._bar.update()

    def epsilon(self) -> float:
        """ε spent by the steps drawn so far."""
        return self._epsilon(self.drawn) if self.drawn else 0.0

    def snapshot(self) -> Progress:
        """What the endpoint serves."""
        return Progress(
            step=self.drawn,
            steps=self.steps,
            epsilon=self.epsilon(),
            steps_per_second=float(f"{self._speed:.2g}"),
            phase=self._phase,
        )


class ProgressServer:
    """Serves `GET /progress` and `GET /healthz` from a thread until `close`.

    Args:
        board: what is served.
        port: the value of the environment's variable.

    Raises:
        BadPlan: it is no port, or cannot be opened.
    """

    def __init__(self, board: ProgressBoard, port: str) -> None:
        if not port.isdecimal() or not 1 <= int(port) <= 65535:
            raise BadPlan(
                f"{Environment.PROGRESS_PORT}: {port!r} is not a port; set a number from 1 to "
                f"65535, or unset the variable to serve no progress"
            )
        try:
            self._server = _Server(("", int(port)), _handler(board))
        except OSError as error:
            raise BadPlan(
                f"{Environment.PROGRESS_PORT}: port {port} cannot be opened ({error.strerror}); "
                f"choose a free one, or unset the variable to serve no progress"
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops serving and frees the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    """Listens on IPv6 and IPv4 alike, since a pod's address may be either."""

    daemon_threads = True
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Not HTTPServer's, which asks DNS for a name that nothing here needs.
        TCPServer.server_bind(self)


def _handler(board: ProgressBoard) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 5  # seconds that a silent client may hold a thread

        def do_GET(self) -> None:
            if self.path == "/progress":
                self._answer(HTTPStatus.OK, "application/json", board.snapshot().to_json())
            elif self.path == "/healthz":
                self._answer(HTTPStatus.OK, "text/plain", "ok")
            else:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", "try /progress or /healthz")

        def _answer(self, status: HTTPStatus, kind: str, body: str) -> None:
            content = body.encode()
            with suppress(ConnectionError):  # who asked may have given up, while this was busy
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Polls of the operator are no news."""

    return Handler
