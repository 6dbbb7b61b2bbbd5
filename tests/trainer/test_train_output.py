"""Where a model goes: whole or not at all, to folders and to object stores."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from dpmoe_trainer.contract import OutputPlan
from dpmoe_trainer.environment import Settings
from dpmoe_trainer.errors import BadPlan, SavingFailed
from dpmoe_trainer.output import open_target

FILES = {"config.json": "{}", "model.safetensors": "weights", "templates/chat.jinja": "hello"}


def settings(output: Path | None = None, root: Path | None = None) -> Settings:
    return Settings(Path("plan"), Path("report"), output, None, root)


def write(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
        (folder / name).chmod(0o600)


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    store = fsspec.filesystem("memory")
    yield store
    store.rm("/bucket", recursive=True)


def test_a_folder_gets_all_files(tmp_path: Path) -> None:
    target = open_target(OutputPlan(path="/models/mine"), settings(root=tmp_path))
    assert target is not None
    assert target.name == "/models/mine"
    target.save(write, 100)
    folder = tmp_path / "models/mine"
    found = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert found == FILES
    assert {(folder / name).stat().st_mode & 0o777 for name in FILES} == {0o644}


def test_a_saved_model_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file before it gets its name, then the names: of the model, and of its folders."""
    done: list[str] = []
    replace = os.replace

    def sync(file: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{file}')).name}")

    def move(source: Path, target: Path) -> None:
        done.append(f"move {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", move)
    target = open_target(OutputPlan(path="/models/mine"), settings(root=tmp_path))
    assert target is not None
    assert sorted(done) == sorted([f"sync {tmp_path.name}", "sync models"])
    done.clear()
    target.save(write, 100)
    files = ["model.safetensors", "chat.jinja", "config.json"]
    assert done[:-2] == [f"{act} {name}" for name in files for act in ("sync", "move")]
    assert sorted(done[-2:]) == ["sync mine", "sync templates"]


@pytest.mark.parametrize(("code", "fine"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_volume_that_cannot_sync_a_folder_is_not_one_that_fails_to(
    code: int, fine: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = open_target(None, settings(output=tmp_path))
    assert target is not None

    def fail(folder: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("dpmoe_trainer.output.sync_folder", fail)
    if fine:
        target.save(write, 100)
    else:
        with pytest.raises(SavingFailed, match="Input/output error"):
            target.save(write, 100)


def test_a_model_that_is_saved_again_needs_no_room_beside_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A volume of room for one model: what lies there is the run's own, and gives way."""
    size, room = 1000, 1500

    def usage(folder: Path) -> object:
        used = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
        return type("Usage", (), {"free": room - used})

    def save(folder: Path) -> None:
        assert usage(folder).free >= size  # type: ignore[attr-defined]
        (folder / "model.safetensors").write_bytes(bytes(size))
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr("dpmoe_trainer.output.shutil.disk_usage", usage)
    monkeypatch.setattr("dpmoe_trainer.output.SPARE_BYTES", 100)
    (tmp_path / "others.safetensors").write_bytes(b"others")
    for again in (False, True, True):
        target = open_target(None, settings(output=tmp_path), again)
        assert target is not None
        target.check_room(size)
        target.save(save, size)
    assert (tmp_path / "others.safetensors").exists()
    assert (tmp_path / "model.safetensors").stat().st_size == size
    (tmp_path / "config.json").unlink()
    target = open_target(None, settings(output=tmp_path))
    assert target is not None
    with pytest.raises(BadPlan, match="make room"):
        target.check_room(size)


def test_a_model_that_is_saved_again_stays_until_it_is_replaced_where_there_is_room(
    tmp_path: Path,
) -> None:
    target = open_target(None, settings(output=tmp_path), again=True)
    assert target is not None
    target.save(write, 100)

    def fail(folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(SavingFailed):
        target.save(fail, 100)
    assert target.holds_model()


def test_a_store_gets_all_files_and_the_configuration_last(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = open_target(OutputPlan(uri="memory://bucket/mine/"), settings())
    assert target is not None
    target.save(write, 100)
    assert {name: memory.cat(f"/bucket/mine/{name}").decode() for name in FILES} == FILES
    created = {name: memory.created(f"/bucket/mine/{name}") for name in FILES}
    assert max(created, key=lambda name: created[name]) == "config.json"
    assert not memory.exists("/bucket/mine/.write-check")
    with pytest.raises(BadPlan, match="already holds a model"):
        open_target(OutputPlan(uri="memory://bucket/mine"), settings())


def test_a_folder_that_cannot_be_asked_is_not_one_without_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = open_target(None, settings(output=tmp_path))
    assert target is not None

    def fail(path: Path) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("dpmoe_trainer.output.is_there", fail)
    with pytest.raises(OSError, match="Input/output error"):
        target.holds_model()


def test_a_store_that_breaks_off(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = open_target(OutputPlan(uri="memory://bucket/mine"), settings())
    assert target is not None

    def break_off(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "the bucket's own words")

    monkeypatch.setattr(type(memory), "put_file", break_off)
    with pytest.raises(SavingFailed, match=r"memory://bucket/mine' \(Permission denied\)"):
        target.save(write, 100)
    assert not memory.exists("/bucket/mine/config.json")


def test_the_command_lines_folder_comes_first(tmp_path: Path) -> None:
    target = open_target(OutputPlan(uri="nosuch://x"), settings(output=tmp_path / "here"))
    assert target is not None
    assert target.name == str(tmp_path / "here")


def test_an_earlier_report_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "lost+found").mkdir()
    target = open_target(None, settings(output=tmp_path))
    assert target is not None
    target.save(write, 100)
    assert (tmp_path / "config.json").exists()


def test_no_output_keeps_no_model() -> None:
    assert open_target(None, settings()) is None


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fill_the_disk(folder: Path) -> None:
        (folder / "model.safetensors").write_text("half of it")
        raise OSError(28, "zebrafish")

    target = open_target(None, settings(output=tmp_path / "here"))
    assert target is not None
    with pytest.raises(SavingFailed, match="No space left on device") as caught:
        target.save(fill_the_disk, 100)
    assert "zebrafish" not in str(caught.value)
    assert not list((tmp_path / "here").iterdir())
