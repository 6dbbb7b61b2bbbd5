"""Everything that a container's environment and volumes are made of, read once before it starts.

Reading is the only effect here; what `Sources` answers afterwards is pure.
"""

import base64
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dpmoe_operator.kube.client import KubeClient, Object
from dpmoe_operator.kube.errors import NotFound
from dpmoe_operator.kube.resources import (
    CONFIG_MAPS,
    PERSISTENT_VOLUME_CLAIMS,
    SECRETS,
    Resource,
)

LOCAL_ADDRESS = "127.0.0.1"
"""The address of the node and of all its pods."""

_ENTRY = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")


class NotReady(Exception):
    """A container can't be started now; a kubelet would wait and try again, so the runner does."""


@dataclass(frozen=True)
class Sources:
    """A pod, and the objects of its namespace that it refers to, by kind and name."""

    pod: Object
    objects: Mapping[tuple[Resource, str], Object]

    def data(self, resource: Resource, name: str, optional: bool) -> dict[str, bytes]:
        """The entries of a ConfigMap or Secret; none of one that is optional and missing.

        Raises:
            NotReady: it is missing.
        """
        obj = self.objects.get((resource, name))
        if obj is None:
            if optional:
                return {}
            raise NotReady(f'{resource.kind.lower()} "{name}" not found')
        data, binary = obj.get("data") or {}, obj.get("binaryData") or {}
        if resource == SECRETS:
            return {key: base64.b64decode(value) for key, value in data.items()}
        entries = {key: value.encode() for key, value in data.items()}
        return entries | {key: base64.b64decode(value) for key, value in binary.items()}

    def has_claim(self, name: str) -> bool:
        """Whether the PersistentVolumeClaim exists."""
        return (PERSISTENT_VOLUME_CLAIMS, name) in self.objects

    def field(self, path: str) -> str:
        """The value of a downward API field; empty for a label or annotation that is not there.

        Raises:
            NotReady: the runner does not know the field.
        """
        metadata, spec = self.pod["metadata"], self.pod["spec"]
        if entry := _ENTRY.fullmatch(path):
            return str((metadata.get(entry[1]) or {}).get(entry[2], ""))
        match path:
            case "metadata.name" | "metadata.namespace" | "metadata.uid":
                return str(metadata[path.removeprefix("metadata.")])
            case "metadata.labels" | "metadata.annotations":
                entries = metadata.get(path.removeprefix("metadata.")) or {}
                return "\n".join(f'{key}="{_escape(entries[key])}"' for key in sorted(entries))
            case "spec.nodeName" | "spec.serviceAccountName":
                return str(spec.get(path.removeprefix("spec."), ""))
            case "status.podIP" | "status.podIPs" | "status.hostIP" | "status.hostIPs":
                return LOCAL_ADDRESS
        raise NotReady(f"fieldPath {path!r} is not supported by the local runner")


async def read_sources(client: KubeClient, pod: Object) -> Sources:
    """Reads what the pod refers to; missing objects are left out."""
    namespace = pod["metadata"]["namespace"]
    objects: dict[tuple[Resource, str], Object] = {}
    for resource, name in sorted(set(_references(pod["spec"])), key=str):
        try:
            objects[resource, name] = await client.get(resource, namespace, name)
        except NotFound:
            continue
    return Sources(pod, objects)


def _references(spec: Object) -> Iterator[tuple[Resource, str]]:
    for volume in spec.get("volumes") or []:
        for source in (volume, *(volume.get("projected") or {}).get("sources", [])):
            yield from _volume_reference(source)
    for container in (*(spec.get("initContainers") or []), *spec["containers"]):
        for source in container.get("envFrom") or []:
            if "configMapRef" in source:
                yield CONFIG_MAPS, source["configMapRef"]["name"]
            if "secretRef" in source:
                yield SECRETS, source["secretRef"]["name"]
        for variable in container.get("env") or []:
            value = variable.get("valueFrom") or {}
            if "configMapKeyRef" in value:
                yield CONFIG_MAPS, value["configMapKeyRef"]["name"]
            if "secretKeyRef" in value:
                yield SECRETS, value["secretKeyRef"]["name"]


def _volume_reference(source: Object) -> Iterator[tuple[Resource, str]]:
    if "configMap" in source:
        yield CONFIG_MAPS, source["configMap"]["name"]
    if "secret" in source:
        # A volume calls it secretName, a projection calls it name.
        yield SECRETS, source["secret"].get("secretName") or source["secret"]["name"]
    if "persistentVolumeClaim" in source:
        yield PERSISTENT_VOLUME_CLAIMS, source["persistentVolumeClaim"]["claimName"]


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
