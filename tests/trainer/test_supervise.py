"""The supervisor: what a pod's ranks get, who is killed when, and which exit code is told."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.trainer.processes import free_port
from tests.trainer.runs import PlanMaker, Trainer, plan_of

from dpmoe_trainer import supervise
from dpmoe_trainer.contract import ExitCode, Outcome, ParallelPlan
from dpmoe_trainer.environment import Pod, Worker
from dpmoe_trainer.errors import PeerLost
from dpmoe_trainer.supervise import (
    Supervisor,
    heartbeat,
    is_silent,
    most_telling,
    world_problem,
)

KILL, TERM = -signal.SIGKILL, -signal.SIGTERM


@pytest.mark.parametrize(
    ("codes", "asked", "expected"),
    [
        ([0, 0], False, ExitCode.COMPLETED),
        ([0, 0], True, ExitCode.COMPLETED),
        ([143, 143], True, ExitCode.STOPPED),
        ([143, 0], True, ExitCode.STOPPED),
        ([143, 143], False, ExitCode.STOPPED),
        ([10, 7, KILL, 1], False, ExitCode.BAD_MODEL),
        ([6, 9, 143], True, ExitCode.BAD_DATA),
        ([8, 10], False, ExitCode.JOURNAL_LOST),
        ([11, KILL, 10, 1], False, ExitCode.HUNG),
        ([11, 9], False, ExitCode.BAD_CHECKPOINT),
        ([1, 10, 143], False, ExitCode.CRASHED),
        ([143, 10], True, ExitCode.STOPPED),
        ([143, 10], False, ExitCode.PEER_LOST),
        ([KILL, 10], False, ExitCode.PEER_LOST),
        ([KILL, 143], False, ExitCode.CRASHED),
        ([TERM, 143], True, ExitCode.STOPPED),
        ([TERM, 0], False, ExitCode.CRASHED),
        ([0, 2], False, ExitCode.CRASHED),
        ([255, 10], False, ExitCode.CRASHED),
    ],
)
def test_the_most_telling_code(codes: list[int], asked: bool, expected: ExitCode) -> None:
    assert most_telling(codes, asked) is expected
    assert most_telling(codes[::-1], asked) is expected


@pytest.mark.parametrize(
    ("now", "heard", "beaten", "timeout", "expected"),
    [
        (10.0, 0.0, True, 10.0, False),
        (10.1, 0.0, True, 10.0, True),
        (10.1, 5.0, True, 10.0, False),
        (299.0, 0.0, False, 10.0, False),
        (301.0, 0.0, False, 10.0, True),
        (301.0, 0.0, False, 600.0, False),
    ],
)
def test_silence(now: float, heard: float, beaten: bool, timeout: float, expected: bool) -> None:
    assert is_silent(now, heard, beaten, timeout) is expected


def pod(nodes: int, processes: int, rank: int = 0) -> Pod:
    return Pod(nodes, processes, rank, "host", "1")


@pytest.mark.parametrize(
    ("workers", "processes", "worker", "place", "words"),
    [
        (1, 1, None, None, None),
        (1, 4, None, None, None),
        (2, 4, None, pod(2, 4, 1), None),
        (2, 4, Worker(7, 3, 8), pod(2, 4, 1), None),
        (2, 4, Worker(7, 3, 8), None, None),
        (1, 1, None, pod(1, 1), None),
        (2, 4, None, None, ["2 workers × 4 processes", "PET_NNODES", "set workers to 1"]),
        (2, 4, None, pod(1, 8), ["8 ranks", "PET_NNODES 1", "PET_NPROC_PER_NODE 8"]),
        (2, 4, None, pod(2, 4, 2), ["pod 2 of PET_NNODES 2"]),
        (1, 1, None, pod(1, 4), ["1 ranks", "PET_NPROC_PER_NODE 4"]),
        (2, 4, Worker(0, 0, 4), None, ["8 ranks", "WORLD_SIZE 4"]),
        (1, 1, Worker(1, 1, 2), None, ["1 ranks", "WORLD_SIZE 2"]),
        (1, 2, Worker(2, 2, 2), None, ["RANK is 2"]),
    ],
)
def test_ranks_that_are_not_the_plans(
    workers: int, processes: int, worker: Worker | None, place: Pod | None, words: list[str] | None
) -> None:
    problem = world_problem(ParallelPlan(workers=workers, processes=processes), worker, place)
    assert (problem is None) == (words is None), problem
    for word in words or ():
        assert problem is not None
        assert word in problem


FAKE = """
import os, signal, sys, time
from dpmoe_trainer.supervise import heartbeat
rank, folder = os.environ["RANK"], sys.argv[1]
beat = heartbeat(int(os.environ["DPMOE_HEARTBEAT"]))
def note(what):
    with open(f"{folder}/{rank}", "a") as file: file.write(what + chr(10))
def go_on():
    while True:
        beat()
        time.sleep(0.02)
def wait_for_all():
    while not all(os.path.exists(f"{folder}/{other}") for other in range(3)):
        time.sleep(0.01)
def stop(*_):
    note("term")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
note(str(os.getpid()))
beat()
"""


class Ranks:
    """Runs fake ranks under a supervisor; each does what its code says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stopping = False

    def run(self, code: str, processes: int = 3, place: Pod | None = None) -> tuple[ExitCode, str]:
        parallel = ParallelPlan(
            workers=place.nodes if place else 1, processes=processes, timeout_seconds=5
        )
        program = (sys.executable, "-c", FAKE + code)
        supervisor = Supervisor(parallel, place, [str(self.folder)], program)
        return supervisor.run(lambda: self.stopping)

    def notes(self, rank: int) -> list[str]:
        path = self.folder / str(rank)
        return path.read_text().split("\n")[:-1] if path.exists() else []

    def when_all_run(self, act: str, processes: int = 3) -> threading.Thread:
        def work() -> None:
            while not all(self.notes(rank) for rank in range(processes)):
                time.sleep(0.01)
            if act == "ask":
                self.stopping = True
            else:
                os.kill(int(self.notes(1)[0]), getattr(signal, act))

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    def alive(self, processes: int = 3) -> list[int]:
        return [rank for rank in range(processes) if Path(f"/proc/{self.notes(rank)[0]}").exists()]


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    monkeypatch.setattr(supervise, "GRACE_SECONDS", 1.0)
    return Ranks(tmp_path)


def test_ranks_get_torchruns_variables(ranks: Ranks) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    code = f"note(' '.join(os.environ[name] for name in {names}))"
    assert ranks.run(code, 2, pod(3, 2, rank=1)) == (ExitCode.COMPLETED, "")
    assert ranks.notes(2)[1] == "2 0 6 2 host 1"
    assert ranks.notes(3)[1] == "3 1 6 2 host 1"


def test_a_failed_rank_stops_the_others_and_its_code_is_told(ranks: Ranks) -> None:
    assert ranks.run("if rank == '1': wait_for_all(); sys.exit(6)\ngo_on()") == (
        ExitCode.BAD_DATA,
        "",
    )
    assert ranks.notes(0)[1:] == ranks.notes(2)[1:] == ["term"]


def test_a_rank_that_does_not_end_in_grace_is_killed(ranks: Ranks) -> None:
    code = "if rank == '1': wait_for_all(); sys.exit(1)\n"
    code += "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ngo_on()"
    started = time.monotonic()
    assert ranks.run(code)[0] is ExitCode.CRASHED
    assert time.monotonic() - started < 30
    assert ranks.alive() == []


def test_a_killed_rank_is_told_by_the_one_that_lost_it(ranks: Ranks) -> None:
    code = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(10))\ngo_on()"
    thread = ranks.when_all_run("SIGKILL")
    assert ranks.run(code)[0] is ExitCode.PEER_LOST
    thread.join()


def test_a_rank_that_is_stopped_in_its_tracks_hangs(ranks: Ranks) -> None:
    thread = ranks.when_all_run("SIGSTOP")
    code, why = ranks.run("go_on()")
    thread.join()
    assert code is ExitCode.HUNG
    assert why == "rank 1 made no progress for 5 s (parallel.timeoutSeconds) and was killed"
    assert ranks.alive() == []
    assert ranks.notes(0)[-1] == "term"


def test_a_silent_rank_hangs_though_it_runs(ranks: Ranks) -> None:
    assert ranks.run("if rank == '2': time.sleep(60)\ngo_on()")[0] is ExitCode.HUNG


def test_a_request_to_stop_reaches_all_ranks(ranks: Ranks) -> None:
    thread = ranks.when_all_run("ask")
    assert ranks.run("go_on()") == (ExitCode.STOPPED, "")
    thread.join()
    assert [ranks.notes(rank)[1:] for rank in range(3)] == [["term"]] * 3


STARTS = """
import sys, time
time.sleep(0.5)  # its imports
from dpmoe_trainer.__main__ import StopFlag
sys.exit(143 if StopFlag().raised else 0)
"""


def test_a_request_to_stop_waits_until_a_rank_can_answer_it() -> None:
    """One that is killed while it starts could not report that it drew nothing."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    program = (sys.executable, "-c", STARTS)
    supervisor = Supervisor(ParallelPlan(processes=2), None, [], program)
    assert supervisor.run(lambda: True) == (ExitCode.STOPPED, "")
    assert not supervisor.rank_0_was_killed()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_a_rank_that_waits_for_others_stops_when_asked(
    trainer: Trainer, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (place | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("dpmoe_trainer.parallel.ranks.STARTUP_SECONDS", 20)
    asking = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    asking.start()
    run = trainer.run(make_plan(parallel={"processes": 2, "timeoutSeconds": 20}))
    asking.join()
    assert run.code == ExitCode.STOPPED, run.stderr
    assert run.report is not None
    assert run.report.mechanism.steps == 0


def test_a_rank_without_its_supervisor_ends() -> None:
    reading, writing = os.pipe()
    beat = heartbeat(writing)
    beat()
    os.close(reading)
    with pytest.raises(PeerLost, match="is gone"):
        beat()
    os.close(writing)
    heartbeat(None)()


def test_a_supervisor_that_does_not_read_holds_nobody_up() -> None:
    reading, writing = os.pipe()
    beat = heartbeat(writing)
    for _ in range(100_000):
        beat()
    os.close(reading)
    os.close(writing)


def test_a_plan_of_many_ranks_is_supervised(
    trainer: Trainer, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command: fake ranks see their place, and the pod tells the code of one."""
    fake = "import os, sys; sys.exit(7 if os.environ['RANK'] == '1' else 0)"
    monkeypatch.setattr(
        supervise.Supervisor.__init__, "__defaults__", ((sys.executable, "-c", fake),)
    )
    run = trainer.run(make_plan(parallel={"processes": 2}))
    assert run.code == ExitCode.BAD_MODEL
    assert run.report is None, "that is rank 0's to write"


JOURNALS = """
import os, signal
from pathlib import Path
from dpmoe_trainer.journal import open_journal
if os.environ["RANK"] == "0":
    journal = open_journal(Path({folder!r}), {run!r}, os.environ["DPMOE_POD_UID"], 0)
    journal.draw(1)
    journal.draw(2)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_rank_0_is_reported_for_by_its_journal(
    trainer: Trainer, make_plan: PlanMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(parallel={"processes": 2}, checkpoint={"path": str(tmp_path / "volume")})
    fake = JOURNALS.format(folder=str(tmp_path / "volume"), run=plan_of(plan).run_digest())
    program = (sys.executable, "-c", fake)
    monkeypatch.setattr(supervise.Supervisor.__init__, "__defaults__", (program,))
    monkeypatch.setenv("DPMOE_POD_UID", "pod-a")
    run = trainer.run(plan)
    assert run.code == ExitCode.CRASHED
    assert run.report is not None
    assert run.report.outcome is Outcome.FAILED
    assert (run.report.mechanism.steps, run.report.attempts) == (2, ("pod-a",))
    assert run.report.epsilon > 0
    assert "rank 0 was killed" in run.report.message


def test_a_worker_of_another_rank_reports_nothing(
    trainer: Trainer, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    run = trainer.run(make_plan(parallel={"processes": 2}))
    assert run.code == ExitCode.BAD_PLAN
    assert run.report is None
    assert "rank 1: Refused: parallel: the plan has 2 ranks" in run.stderr
    assert "WORLD_SIZE 3" in run.stderr
    monkeypatch.setenv("RANK", "0")
    assert trainer.run(make_plan(parallel={"processes": 2})).report is not None


def test_malformed_variables_are_named(
    trainer: Trainer, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PET_NNODES", "one")
    run = trainer.run(make_plan())
    assert run.code == ExitCode.BAD_PLAN
    assert "PET_NNODES: 'one' is not a number" in run.stderr
