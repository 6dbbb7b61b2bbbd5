"""Real processes: how they end, and that none is left behind, whoever is killed."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from dpmoe_operator.local.runner import guardian
from dpmoe_operator.local.runner.process import Process, Processes

T = TypeVar("T")

linux = pytest.mark.skipif(sys.platform != "linux", reason="the guardian reads /proc")

# A child in a session of its own, as torchrun's workers are: no group kill reaches it.
FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                         start_new_session=True)
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def until(condition: Callable[[], T | None]) -> T:
    """The condition's first value that is true; fails after twenty seconds."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("it never became true")


def pids_in(log: Path) -> list[int]:
    """The process ids in the log's first line, once it is complete."""
    return until(
        lambda: (
            [int(pid) for pid in log.read_text().partition("\n")[0].split()]
            if log.exists() and "\n" in log.read_text()
            else None
        )
    )


async def start(
    processes: Processes, directory: Path, *argv: str, log: str = "log", **env: str
) -> Process:
    return await processes.start(
        argv,
        {"PATH": os.environ["PATH"], **env},
        pod=f"{directory}/{log}",
        directory=directory,
        log=directory / log,
    )


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 143), ("kill -KILL $$", 137)],
)
async def test_exit_codes_are_a_shells(tmp_path: Path, script: str, code: int) -> None:
    with Processes() as processes:
        process = await start(processes, tmp_path, "sh", "-c", script)
        assert await process.wait() == code


async def test_output_is_appended_and_its_beginning_known(tmp_path: Path) -> None:
    with Processes() as processes:
        for text, begins in (("one", 0), ("two", 4)):
            script = f"echo {text} >&2; pwd >> cwd; env >> env"
            process = await start(processes, tmp_path, "sh", "-c", script, ONLY="this")
            assert process.log_start == begins
            assert await process.wait() == 0
    assert (tmp_path / "log").read_text() == "one\ntwo\n"
    assert (tmp_path / "cwd").read_text().splitlines() == [str(tmp_path)] * 2
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert names - {"_", "SHLVL", "OLDPWD"} == {"PATH", "ONLY", "PWD", guardian.MARK}


async def test_a_missing_program_is_an_error(tmp_path: Path) -> None:
    with Processes() as processes, pytest.raises(FileNotFoundError):
        await start(processes, tmp_path, "no-such-program")


@linux
async def test_all_of_a_pod_ends_with_it_and_nothing_else(tmp_path: Path) -> None:
    with Processes() as processes:
        mine = await start(processes, tmp_path, sys.executable, "-c", FAMILY, log="mine")
        other = await start(processes, tmp_path, sys.executable, "-c", FAMILY, log="other")
        family = await asyncio.to_thread(pids_in, tmp_path / "mine")
        bystanders = await asyncio.to_thread(pids_in, tmp_path / "other")
        await mine.kill_all()
        assert await mine.wait() == 137
        assert [is_alive(pid) for pid in family] == [False, False]
        assert [is_alive(pid) for pid in bystanders] == [True, True]
        await other.kill_all()
        await other.wait()


RUNNER = f"""
import asyncio, os, sys
from pathlib import Path
from dpmoe_operator.local.runner.process import Processes

async def main():
    with Processes() as processes:
        await processes.start([sys.executable, "-c", {FAMILY!r}], {{"PATH": os.environ["PATH"]}},
                              pod=os.getcwd(), directory=Path("."), log=Path("log"))
        await asyncio.sleep(600)

asyncio.run(main())
"""


@linux
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_killed_runner(tmp_path: Path, how: signal.Signals) -> None:
    runner = subprocess.Popen([sys.executable, "-c", RUNNER], cwd=tmp_path)
    try:
        family = pids_in(tmp_path / "log")
    finally:
        runner.send_signal(how)
        runner.wait()
    until(lambda: not any(is_alive(pid) for pid in family))


def test_the_guardian_never_kills_without_a_mark() -> None:
    with pytest.raises(AssertionError):
        guardian.kill_marked()
