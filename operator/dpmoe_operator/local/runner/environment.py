"""The environment of a container's process, built from nothing so that nothing leaks into it.

A container would bring its own PATH, HOME and host name; here they are made up. Beyond the pod's
own variables, three things differ from a container, because all pods share this machine's address
and file system:

- Absolute paths do not start at the container's root, so `DPMOE_ROOT` names the folder that does.
- Pod names do not resolve, so torchrun's rendezvous moves to the loopback address and a free port.
- Every pod serves its progress on a port of its own.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from dpmoe_operator.kube.client import Object
from dpmoe_operator.kube.resources import CONFIG_MAPS, SECRETS, Resource
from dpmoe_operator.local.runner.expansion import expand
from dpmoe_operator.local.runner.images import Image
from dpmoe_operator.local.runner.quantity import request
from dpmoe_operator.local.runner.sources import LOCAL_ADDRESS, NotReady, Sources
from dpmoe_trainer.contract import Environment

MASTER_ADDRESS = "PET_MASTER_ADDR"
MASTER_PORT = "PET_MASTER_PORT"

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")


@dataclass(frozen=True)
class Place:
    """Where a process runs: its root, its private temporary folder, and its ports."""

    root: Path
    temporary: Path
    progress_port: int
    master_port: int | None


def declared(
    container: Object, sources: Sources, replaced: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The variables that the pod declares, resolved and expanded.

    Args:
        container: the container's part of the pod's spec.
        sources: what the variables' values refer to.
        replaced: values that stand in for those of declared variables of the same names.

    Raises:
        NotReady: an object or a key is missing, or a source is not supported.
    """
    replaced = replaced or {}
    variables: dict[str, str] = {}
    for source in container.get("envFrom") or []:
        prefix = source.get("prefix", "")
        for key, value in _all_of(source, sources).items():
            if _NAME.fullmatch(prefix + key):
                variables[prefix + key] = replaced.get(prefix + key, value)
    for variable in container.get("env") or []:
        name = variable["name"]
        value_or_none = _value(variable, variables, sources)
        if value_or_none is not None:
            variables[name] = replaced.get(name, value_or_none)
    return variables


def build(container: Object, image: Image, sources: Sources, place: Place) -> dict[str, str]:
    """The whole environment of the container's process.

    Raises:
        NotReady: as `declared` does.
    """
    replaced = {Environment.PROGRESS_PORT.value: str(place.progress_port)}
    if place.master_port is not None:
        replaced |= {MASTER_ADDRESS: LOCAL_ADDRESS, MASTER_PORT: str(place.master_port)}
    pod = sources.pod
    environment = {
        "PATH": _PATH,
        "HOME": "/home",
        "LANG": "C.UTF-8",
        "HOSTNAME": pod["spec"].get("hostname") or pod["metadata"]["name"],
        **_thread_count(container),
        **image.env,
        **declared(container, sources, replaced),
        "TMPDIR": str(place.temporary),
        Environment.ROOT.value: str(place.root),
        Environment.PROGRESS_PORT.value: str(place.progress_port),
    }
    # Programs take HOME as it is, and must not write to this machine's.
    environment["HOME"] = str(place.root / environment["HOME"].lstrip("/"))
    return environment


def _all_of(source: Object, sources: Sources) -> dict[str, str]:
    for field, resource in (("configMapRef", CONFIG_MAPS), ("secretRef", SECRETS)):
        if field in source:
            reference = source[field]
            data = sources.data(resource, reference["name"], reference.get("optional", False))
            return {key: value.decode(errors="replace") for key, value in data.items()}
    return {}


def _value(variable: Object, earlier: Mapping[str, str], sources: Sources) -> str | None:
    """The variable's value; `None` where it refers to something optional that is missing."""
    origin = variable.get("valueFrom")
    if not origin:
        return expand(variable.get("value") or "", earlier)
    if "fieldRef" in origin:
        return sources.field(origin["fieldRef"]["fieldPath"])
    if "configMapKeyRef" in origin:
        return _entry(CONFIG_MAPS, origin["configMapKeyRef"], sources)
    if "secretKeyRef" in origin:
        return _entry(SECRETS, origin["secretKeyRef"], sources)
    raise NotReady(
        f"env {variable['name']!r}: {', '.join(origin)} is not supported by the local runner"
    )


def _entry(resource: Resource, reference: Object, sources: Sources) -> str | None:
    optional = reference.get("optional", False)
    name, key = reference["name"], reference["key"]
    value = sources.data(resource, name, optional).get(key)
    if value is None and not optional:
        raise NotReady(f"couldn't find key {key} in {resource.kind} {name}")
    return None if value is None else value.decode(errors="replace")


def _thread_count(container: Object) -> dict[str, str]:
    """As many OpenMP threads as the container asked for processors."""
    processors = request(container, "cpu")
    if processors == Decimal(0):
        return {}
    return {"OMP_NUM_THREADS": str(max(1, math.ceil(processors)))}
