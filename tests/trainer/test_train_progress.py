"""The progress board and its endpoint: what is counted, and what is served."""

import json
import socket
import urllib.error
import urllib.request

import pytest

from dpmoe_trainer.contract import Progress
from dpmoe_trainer.errors import BadPlan
from dpmoe_trainer.progress import ProgressBoard, ProgressServer


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(clock: Clock) -> ProgressBoard:
    return ProgressBoard(10, epsilon=lambda steps: steps / 4, clock=clock)


def test_a_step_is_spent_when_drawn(board: ProgressBoard, clock: Clock) -> None:
    assert board.snapshot() == Progress(step=0, steps=10, epsilon=0)
    board.enter("Training")
    board.count_draw()
    assert board.snapshot() == Progress(step=1, steps=10, epsilon=0.25, phase="Training")
    clock.now = 2.0
    board.count_update()
    board.count_draw()
    clock.now = 3.0
    board.count_update()
    board.enter("Saving")
    assert board.snapshot() == Progress(
        step=2, steps=10, epsilon=0.5, steps_per_second=0.67, phase="Saving"
    )


def test_a_resumed_run_counts_what_earlier_attempts_drew(clock: Clock) -> None:
    board = ProgressBoard(10, epsilon=lambda steps: steps / 4, clock=clock)
    board.resume(step=4, drawn=6)
    board.enter("Training")
    assert board.snapshot().step == 6
    assert board.epsilon() == 1.5
    clock.now = 2.0
    board.count_update()
    assert board.snapshot().steps_per_second == 0.5, "of this attempt"


def test_every_sign_of_progress_is_a_beat(clock: Clock) -> None:
    beats: list[int] = []
    board = ProgressBoard(10, lambda steps: 0.0, clock, beat=lambda: beats.append(1))
    board.enter("Training")
    board.count_draw()
    board.count_update()
    assert len(beats) == 3


def test_no_bar_where_there_is_no_terminal(
    board: ProgressBoard, capfd: pytest.CaptureFixture[str]
) -> None:
    board.enter("Training")
    board.count_draw()
    board.count_update()
    board.enter("Done")
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def port() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


def test_the_endpoint_serves_progress_and_health(board: ProgressBoard, port: str) -> None:
    server = ProgressServer(board, port)
    board.enter("Training")
    board.count_draw()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=5) as answer:
        assert answer.headers["Content-Type"] == "application/json"
        content = json.loads(answer.read())
    assert Progress.model_validate(content) == board.snapshot()
    assert content.keys() == {"step", "steps", "epsilon", "stepsPerSecond", "phase"}
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
        assert answer.read() == b"ok"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/plan", timeout=5)
    server.close()


def test_a_port_is_taken_until_its_server_closes(board: ProgressBoard, port: str) -> None:
    server = ProgressServer(board, port)
    with pytest.raises(BadPlan, match=f"port {port} cannot be opened"):
        ProgressServer(board, port)
    server.close()
    ProgressServer(board, port).close()


@pytest.mark.parametrize("value", ["0", "65536", "-1", "http", "80 "])
def test_what_is_no_port(board: ProgressBoard, value: str) -> None:
    with pytest.raises(BadPlan, match=f"'{value}' is not a port"):
        ProgressServer(board, value)
