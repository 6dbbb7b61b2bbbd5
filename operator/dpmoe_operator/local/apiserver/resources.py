"""Which resources exist: the built-in ones, and those that CustomResourceDefinitions add.

A `Resource` is one row of discovery: a plural in a group and version, and all the facts the
server needs to serve it. Several resources may share one storage (the versions of a CRD; the two
Event APIs), so objects are kept under `Resource.storage` and converted when they leave.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]
StorageKey = tuple[str, str]  # group, plural

VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")
CRD_GROUP = "apiextensions.k8s.io"


@dataclass(frozen=True)
class Resource:
    """One served resource.

    Attributes:
        has_status: there is a `/status` subresource, apart from the main one.
        has_generation: `metadata.generation` counts the changes of the desired state.
        subresources: names of further subresources.
        fields: paths that field selectors may use, beside the name and the namespace.
        storage: under which key the objects are kept.
        renames: (stored field, served field) pairs, where they differ.
        custom: defined by a CRD, so validated, pruned and defaulted by `schema`.
        columns: `additionalPrinterColumns` of the CRD; None prints the age only.
    """

    group: str
    version: str
    plural: str
    kind: str
    storage: StorageKey
    namespaced: bool = True
    singular: str = ""
    short_names: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    verbs: tuple[str, ...] = VERBS
    has_status: bool = False
    has_generation: bool = False
    subresources: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    custom: bool = False
    schema: Mapping[str, Any] | None = None
    columns: tuple[Mapping[str, Any], ...] | None = None
    list_kind: str = ""

    @property
    def api_version(self) -> str:
        """`v1` or `group/v1`, as in an object's `apiVersion`."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def qualified(self) -> str:
        """`pods` or `jobs.batch`, as in messages."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def is_native(self, stored: Object) -> bool:
        """Whether the stored form is already the served one."""
        return not self.renames and stored["apiVersion"] == self.api_version

    def to_served(self, stored: Object) -> Object:
        """The object as clients of this resource see it."""
        if self.is_native(stored):
            return stored
        names = dict(self.renames)
        served = {names.get(field, field): value for field, value in stored.items()}
        return {**served, "apiVersion": self.api_version}

    def to_stored(self, served: Object) -> Object:
        """The object as it is kept; versions of a CRD share their schema, so none converts."""
        if not self.renames:
            return served
        names = {there: here for here, there in self.renames}
        stored = {names.get(field, field): value for field, value in served.items()}
        return {**stored, "apiVersion": "v1"}


def _builtin(
    api_version: str, kind: str, plural: str, short_names: str = "", **facts: Any
) -> Resource:
    group, _, version = api_version.rpartition("/")
    facts.setdefault("storage", (group, plural))
    return Resource(
        group=group,
        version=version,
        plural=plural,
        kind=kind,
        singular=kind.lower(),
        short_names=tuple(short_names.split()),
        list_kind=f"{kind}List",
        **facts,
    )


_EVENT_FIELDS = (
    *(f"involvedObject.{field}" for field in ("kind", "namespace", "name", "uid", "apiVersion")),
    *("involvedObject.resourceVersion", "involvedObject.fieldPath"),
    *("reason", "reportingComponent", "type"),
)
_POD_FIELDS = (
    *("spec.nodeName", "spec.restartPolicy", "spec.schedulerName", "spec.serviceAccountName"),
    *("status.phase", "status.podIP"),
)
# In events.k8s.io the old fields of the core API live on under other names.
_EVENT_RENAMES = (
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("reportingComponent", "reportingController"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
)
_SPEC_AND_STATUS: dict[str, Any] = {"has_status": True, "has_generation": True}
_ADMISSION = "admissionregistration.k8s.io/v1"
_RBAC = "rbac.authorization.k8s.io/v1"

NAMESPACES = _builtin(
    "v1", "Namespace", "namespaces", "ns",
    namespaced=False, has_status=True, fields=("status.phase",),
)  # fmt: skip
PODS = _builtin(
    "v1", "Pod", "pods", "po",
    **_SPEC_AND_STATUS, categories=("all",), subresources=("binding", "log"), fields=_POD_FIELDS,
)  # fmt: skip
JOBS = _builtin(
    "batch/v1", "Job", "jobs",
    **_SPEC_AND_STATUS, categories=("all",),
)  # fmt: skip
CRDS = _builtin(
    f"{CRD_GROUP}/v1", "CustomResourceDefinition", "customresourcedefinitions", "crd crds",
    **_SPEC_AND_STATUS, namespaced=False, categories=("api-extensions",),
)  # fmt: skip
SERVICE_ACCOUNTS = _builtin("v1", "ServiceAccount", "serviceaccounts", "sa")
ACCESS_REVIEWS = _builtin(
    "authorization.k8s.io/v1", "SelfSubjectAccessReview", "selfsubjectaccessreviews",
    namespaced=False, verbs=("create",),
)  # fmt: skip

BUILTINS = (
    NAMESPACES,
    PODS,
    JOBS,
    CRDS,
    SERVICE_ACCOUNTS,
    ACCESS_REVIEWS,
    _builtin("v1", "ConfigMap", "configmaps", "cm"),
    _builtin("v1", "Secret", "secrets", fields=("type",)),
    _builtin("v1", "Service", "services", "svc", has_status=True, categories=("all",)),
    _builtin("v1", "PersistentVolumeClaim", "persistentvolumeclaims", "pvc", has_status=True),
    _builtin(
        "v1", "PersistentVolume", "persistentvolumes", "pv", has_status=True, namespaced=False
    ),
    _builtin("v1", "Node", "nodes", "no", has_status=True, namespaced=False),
    _builtin("v1", "Event", "events", "ev", fields=_EVENT_FIELDS),
    _builtin(
        "events.k8s.io/v1", "Event", "events", "ev",
        storage=("", "events"), renames=_EVENT_RENAMES,
    ),
    _builtin("coordination.k8s.io/v1", "Lease", "leases"),
    _builtin(
        "networking.k8s.io/v1", "NetworkPolicy", "networkpolicies", "netpol", has_generation=True
    ),
    _builtin(_RBAC, "Role", "roles"),
    _builtin(_RBAC, "RoleBinding", "rolebindings"),
    _builtin(_RBAC, "ClusterRole", "clusterroles", namespaced=False),
    _builtin(_RBAC, "ClusterRoleBinding", "clusterrolebindings", namespaced=False),
    _builtin(
        _ADMISSION, "ValidatingAdmissionPolicy", "validatingadmissionpolicies",
        namespaced=False, **_SPEC_AND_STATUS,
    ),
    _builtin(
        _ADMISSION, "ValidatingAdmissionPolicyBinding", "validatingadmissionpolicybindings",
        namespaced=False, has_generation=True,
    ),
)  # fmt: skip


def resources_of_crd(crd: Object) -> list[Resource]:
    """The resources of all served versions of a CustomResourceDefinition."""
    spec, names = crd["spec"], crd["spec"]["names"]
    return [
        Resource(
            group=spec["group"],
            version=version["name"],
            plural=names["plural"],
            kind=names["kind"],
            storage=(spec["group"], names["plural"]),
            namespaced=spec["scope"] == "Namespaced",
            singular=names["singular"],
            short_names=tuple(names.get("shortNames", ())),
            categories=tuple(names.get("categories", ())),
            has_status="status" in version.get("subresources", {}),
            has_generation=True,
            fields=tuple(
                each["jsonPath"].removeprefix(".") for each in version.get("selectableFields", ())
            ),
            custom=True,
            schema=version["schema"]["openAPIV3Schema"],
            columns=tuple(version["additionalPrinterColumns"])
            if "additionalPrinterColumns" in version
            else None,
            list_kind=names["listKind"],
        )
        for version in spec["versions"]
        if version["served"]
    ]


class Registry:
    """All resources the server serves now."""

    def __init__(self) -> None:
        self._resources: dict[tuple[str, str, str], Resource] = {}
        for resource in BUILTINS:
            self._add(resource)

    def __iter__(self) -> Iterator[Resource]:
        return iter(self._resources.values())

    def find(self, group: str, version: str, plural: str) -> Resource | None:
        """The resource at a path, or None."""
        return self._resources.get((group, version, plural))

    def of_storage(self, key: StorageKey) -> Resource:
        """The first resource that shows the objects kept under `key`."""
        return next(each for each in self if each.storage == key)

    def versions(self) -> dict[str, list[str]]:
        """Group → its versions in order; the first is the preferred one."""
        found: dict[str, list[str]] = {}
        for resource in self:
            versions = found.setdefault(resource.group, [])
            if resource.version not in versions:
                versions.append(resource.version)
        return found

    def define(self, crd: Object) -> None:
        """Serves what a CustomResourceDefinition describes, in place of what it did before."""
        self.forget(crd)
        for resource in resources_of_crd(crd):
            self._add(resource)

    def forget(self, crd: Object) -> None:
        """Stops serving what a CustomResourceDefinition describes."""
        storage = (crd["spec"]["group"], crd["spec"]["names"]["plural"])
        self._resources = {
            key: each for key, each in self._resources.items() if each.storage != storage
        }

    def _add(self, resource: Resource) -> None:
        self._resources[resource.group, resource.version, resource.plural] = resource
