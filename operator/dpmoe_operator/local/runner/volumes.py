"""A pod's folder: its volumes, the root in which each container finds them, its log.

A volume is a folder or file, and a mount is a symbolic link to it below the container's root. What
holds:

- Everything of a pod but its claims and host paths is below one folder that only the user can
  read, and goes with the pod.
- Read-only mounts are plain links: nothing stops a process from writing through them.
- No link or file lands outside the pod's folder, whatever paths the pod names.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dpmoe_operator.kube.client import Object
from dpmoe_operator.kube.resources import CONFIG_MAPS, SECRETS
from dpmoe_operator.local.runner.expansion import expand
from dpmoe_operator.local.runner.sources import NotReady, Sources

TERMINATION_MESSAGE_BYTES = 4096
_FALLBACK_BYTES = 2048
_FALLBACK_LINES = 80
_DEFAULT_MODE = 0o644


@dataclass(frozen=True)
class PodFolder:
    """Where one pod's files are, below the runner's own folder."""

    path: Path
    claims: Path

    @property
    def log(self) -> Path:
        """Everything that the pod's containers print."""
        return self.path / "log"

    @property
    def temporary(self) -> Path:
        """A private folder for temporary files.

        It is beside the machine's others, since sockets in it must have short paths.
        """
        return (self.path / "tmp").resolve()

    def root(self, container: str) -> Path:
        """The folder that stands for `/` in the container."""
        return self.path / "roots" / container

    def create(self) -> None:
        """Makes the folder; one that is left from before stays as it is."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (self.path / "tmp").is_dir():
            (self.path / "tmp").unlink(missing_ok=True)
            (self.path / "tmp").symlink_to(tempfile.mkdtemp(prefix="dpmoe-"))

    def remove_temporary(self) -> None:
        """Deletes the temporary files."""
        if (self.path / "tmp").is_symlink():
            shutil.rmtree(self.temporary, ignore_errors=True)

    def remove(self) -> None:
        """Deletes all of the pod's files but those of its claims and host paths."""
        self.remove_temporary()
        shutil.rmtree(self.path, ignore_errors=True)

    def lay_out(self, container: Object, sources: Sources, variables: Mapping[str, str]) -> Path:
        """Makes the container's root anew, with its mounts and an empty termination log.

        Args:
            container: the container's part of the pod's spec.
            sources: what the volumes are made of.
            variables: the container's variables, for mounts that name them.

        Returns:
            The root.

        Raises:
            NotReady: something that a volume needs is missing or not supported.
        """
        root = self.root(container["name"])
        if root.exists():
            shutil.rmtree(root)
        root.mkdir(parents=True)
        volumes = {volume["name"]: volume for volume in sources.pod["spec"].get("volumes") or []}
        mounted: list[PurePosixPath] = []
        for mount in container.get("volumeMounts") or []:
            link = _inside(root, mount["mountPath"])
            where = PurePosixPath("/", link.relative_to(root))
            if link == root:
                raise NotReady("mountPath '/' is not supported by the local runner")
            for other in mounted:
                if where.is_relative_to(other) or other.is_relative_to(where):
                    raise NotReady(f"mounts inside of mounts ({where}, {other}) are not supported")
            mounted.append(where)
            if mount["name"] not in volumes:
                raise NotReady(f"volumeMounts names {mount['name']!r}, which is not in volumes")
            target = self._materialise(volumes[mount["name"]], sources)
            below = mount.get("subPath") or expand(mount.get("subPathExpr") or "", variables)
            if below:
                target = _inside(target, below)
                if not target.exists():
                    target.mkdir(parents=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target.absolute())
        if not os.path.lexists(root / "tmp"):
            (root / "tmp").symlink_to(self.temporary)
        message = self.termination_log(container)
        message.parent.mkdir(parents=True, exist_ok=True)
        message.touch()
        return root

    def termination_log(self, container: Object) -> Path:
        """The file in which the container leaves its last words."""
        path = container.get("terminationMessagePath") or "/dev/termination-log"
        return _inside(self.root(container["name"]), path)

    def termination_message(self, container: Object, failed: bool, log_start: int) -> str:
        """The last words of a container that has ended.

        Args:
            container: the container's part of the pod's spec.
            failed: whether its exit code was not 0; then, if the policy says so and the file is
                empty, the end of its log counts.
            log_start: where in the log the container's own lines begin.
        """
        message = _tail(self.termination_log(container), TERMINATION_MESSAGE_BYTES)
        fallback = container.get("terminationMessagePolicy") == "FallbackToLogsOnError"
        if message or not (failed and fallback):
            return message
        size = self.log.stat().st_size if self.log.exists() else 0
        end = _tail(self.log, min(_FALLBACK_BYTES, size - log_start))
        return "".join(end.splitlines(keepends=True)[-_FALLBACK_LINES:])

    def _materialise(self, volume: Object, sources: Sources) -> Path:
        """The volume's folder or file; one that is there already is used again."""
        path = self.path / "volumes" / str(volume["name"])
        if "hostPath" in volume:
            return _host_path(volume["hostPath"])
        if "persistentVolumeClaim" in volume:
            claim = str(volume["persistentVolumeClaim"]["claimName"])
            if not sources.has_claim(claim):
                raise NotReady(f'persistentvolumeclaim "{claim}" not found')
            path = self.claims / claim
            path.mkdir(parents=True, exist_ok=True)
            return path
        if "emptyDir" in volume:
            path.mkdir(parents=True, exist_ok=True)
            return path
        files = list(_files(volume, sources))
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        for name, content, mode in files:
            file = _inside(path, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            file.chmod(mode & 0o777)
        return path


def _files(volume: Object, sources: Sources) -> Iterator[tuple[str, bytes, int]]:
    """The files of a volume that is made of API objects: path, content, mode."""
    if "configMap" in volume:
        source = volume["configMap"]
        entries = sources.data(CONFIG_MAPS, source["name"], source.get("optional", False))
        yield from _chosen(source, entries)
    elif "secret" in volume:
        source = volume["secret"]
        name = source.get("secretName") or source["name"]
        yield from _chosen(source, sources.data(SECRETS, name, source.get("optional", False)))
    elif "downwardAPI" in volume:
        source = volume["downwardAPI"]
        for item in source.get("items") or []:
            if "fieldRef" not in item:
                raise NotReady("downwardAPI: only fieldRef is supported by the local runner")
            content = sources.field(item["fieldRef"]["fieldPath"]).encode()
            yield item["path"], content, _mode(item, source)
    elif "projected" in volume:
        for source in volume["projected"].get("sources") or []:
            # Local processes get no API token: it would be good on the whole machine.
            if "serviceAccountToken" not in source:
                yield from _files(source, sources)
    else:
        kinds = ", ".join(sorted(set(volume) - {"name"}))
        raise NotReady(f"volumes of type {kinds} are not supported by the local runner")


def _chosen(source: Object, entries: Mapping[str, bytes]) -> Iterator[tuple[str, bytes, int]]:
    items = source.get("items")
    if not items:
        for key, content in entries.items():
            yield key, content, _mode({}, source)
        return
    for item in items:
        if item["key"] in entries:
            yield item["path"], entries[item["key"]], _mode(item, source)
        elif not source.get("optional", False):
            raise NotReady(f"references non-existent key: {item['key']}")


def _mode(item: Object, source: Object) -> int:
    return int(item.get("mode") or source.get("defaultMode") or _DEFAULT_MODE)


def _host_path(source: Object) -> Path:
    path, kind = Path(source["path"]), source.get("type") or ""
    if kind == "DirectoryOrCreate":
        path.mkdir(parents=True, exist_ok=True)
    elif kind == "FileOrCreate":
        path.touch()
    if not path.exists():
        raise NotReady(f"hostPath {path} does not exist")
    if kind.startswith("Directory") and not path.is_dir():
        raise NotReady(f"hostPath {path} is no directory")
    if kind.startswith("File") and not path.is_file():
        raise NotReady(f"hostPath {path} is no file")
    return path


def _inside(folder: Path, path: str) -> Path:
    """`path` taken from `folder` as its root; refuses to climb out of it."""
    parts = PurePosixPath(path).parts
    if ".." in parts:
        raise NotReady(f"path {path!r} must not contain '..'")
    return folder.joinpath(*(part for part in parts if part != "/"))


def _tail(path: Path, size: int) -> str:
    """The last bytes of a plain file, as text; nothing of anything else."""
    if path.is_symlink() or not path.is_file() or size <= 0:
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read(size).decode(errors="replace")
