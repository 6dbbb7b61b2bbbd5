"""What the built-in kinds do beside being stored: defaults on creation, and a few rules.

Only what clients of this project rely on is here; built-in objects are otherwise stored as they
come, without validation. Each `_prepare_*` function takes a new object and returns the one to
store; each `_revise_*` takes the old and the new version. Both are found by the storage key.
"""

import base64
from collections.abc import Callable, Mapping
from typing import Any

from .errors import Cause, invalid, invalid_object
from .resources import CRDS, JOBS, NAMESPACES, PODS, Object, Resource, StorageKey
from .tables import parse_path

JOB_NAME_LABEL = "batch.kubernetes.io/job-name"
CONTROLLER_UID_LABEL = "batch.kubernetes.io/controller-uid"
CRD_CLEANUP_FINALIZER = "customresourcecleanup.apiextensions.k8s.io"

# Job features that the controller in this package does not have. Refused, never ignored.
UNSUPPORTED_JOB_FIELDS = ("managedBy", "manualSelector")


def prepare(resource: Resource, obj: Object) -> Object:
    """Applies the defaults of a built-in kind to a new object.

    Raises:
        ApiError: 422, if the object lacks what its kind can't do without.
    """
    prepare_kind = _PREPARE.get(resource.storage)
    return prepare_kind(obj) if prepare_kind else obj


def revise(resource: Resource, old: Object, new: Object) -> Object:
    """Applies the rules of a built-in kind to a change of the main resource.

    Raises:
        ApiError: 422, for a change of what the kind holds immutable.
    """
    revise_kind = _REVISE.get(resource.storage)
    return revise_kind(old, new) if revise_kind else new


def keeps_status_on_create(resource: Resource) -> bool:
    """Whether a new object may bring its status along, as a kubelet's Node does."""
    return resource.storage == ("", "nodes")


# Namespaces, secrets, volumes


def _prepare_namespace(obj: Object) -> Object:
    metadata = obj["metadata"]
    labels = {**metadata.get("labels", {}), "kubernetes.io/metadata.name": metadata["name"]}
    return {
        **obj,
        "metadata": {**metadata, "labels": labels},
        "spec": {"finalizers": ["kubernetes"]},
        "status": {"phase": "Active"},
    }


def _prepare_secret(obj: Object) -> Object:
    plain = obj.get("stringData") or {}
    encoded = {key: base64.b64encode(value.encode()).decode() for key, value in plain.items()}
    rest = {name: value for name, value in obj.items() if name != "stringData"}
    if encoded:
        rest["data"] = {**(obj.get("data") or {}), **encoded}
    return {"type": "Opaque", **rest}


def _prepare_claim(obj: Object) -> Object:
    """Claims are bound at once, to a volume that exists in name only."""
    spec = obj.get("spec", {})
    name = spec.get("volumeName") or f"pvc-{obj['metadata']['uid']}"
    status = {
        "phase": "Bound",
        "accessModes": spec.get("accessModes", []),
        "capacity": spec.get("resources", {}).get("requests", {}),
    }
    return {**obj, "spec": {"volumeMode": "Filesystem", **spec, "volumeName": name}} | {
        "status": status
    }


def _prepare_volume(obj: Object) -> Object:
    return {**obj, "status": {"phase": "Available"}}


def _revise_data(old: Object, new: Object) -> Object:
    """ConfigMaps and Secrets: `immutable: true` freezes the data and can't be taken back."""
    if old["kind"] == "Secret":
        new = _prepare_secret(new)
    changed = [
        field for field in ("data", "binaryData", "immutable") if old.get(field) != new.get(field)
    ]
    if old.get("immutable") and changed:
        detail = "field is immutable when `immutable` is set"
        causes = [Cause.forbidden(field, detail) for field in changed]
        raise invalid(new["kind"], "", new["metadata"]["name"], causes)
    return new


# Pods


def _prepare_pod(obj: Object) -> Object:
    spec = _pod_spec(PODS, obj["metadata"]["name"], "spec", obj.get("spec"))
    spec = {"serviceAccountName": "default", **spec}
    return {**obj, "spec": spec, "status": {"phase": "Pending"}}


def _pod_spec(resource: Resource, name: str, path: str, spec: Any) -> Object:
    containers = spec.get("containers") if isinstance(spec, dict) else None
    if not containers:
        raise invalid_object(resource, name, Cause.required(f"{path}.containers"))
    for i, container in enumerate(containers):
        if not container.get("name"):
            raise invalid_object(resource, name, Cause.required(f"{path}.containers[{i}].name"))
    defaults = {
        "restartPolicy": "Always",
        "terminationGracePeriodSeconds": 30,
        "dnsPolicy": "ClusterFirst",
        "schedulerName": "default-scheduler",
    }
    return {**defaults, **spec, "containers": [_container(each) for each in containers]}


def _container(container: Object) -> Object:
    defaults = {
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
    }
    return {**defaults, **container}


# Jobs


def _prepare_job(obj: Object) -> Object:
    metadata, spec = obj["metadata"], obj.get("spec", {})
    name = metadata["name"]
    causes = _job_causes(spec)
    if causes:
        raise invalid_object(JOBS, name, *causes)
    template = spec["template"]
    labels = {
        CONTROLLER_UID_LABEL: metadata["uid"],
        JOB_NAME_LABEL: name,
        "controller-uid": metadata["uid"],
        "job-name": name,
    }
    pod_metadata = template.get("metadata") or {}
    return {
        **obj,
        "metadata": {**metadata, "labels": metadata.get("labels", {}) | labels},
        "spec": {
            **_job_defaults(spec),
            "selector": {"matchLabels": {CONTROLLER_UID_LABEL: metadata["uid"]}},
            "template": {
                "metadata": {**pod_metadata, "labels": pod_metadata.get("labels", {}) | labels},
                "spec": _pod_spec(JOBS, name, "spec.template.spec", template.get("spec")),
            },
        },
        "status": {},
    }


def _job_defaults(spec: Object) -> Object:
    replace = "Failed" if "podFailurePolicy" in spec else "TerminatingOrFailed"
    per_index = spec.get("backoffLimitPerIndex") is not None
    defaults = {
        "parallelism": 1,
        "backoffLimit": 2**31 - 1 if per_index else 6,
        "completionMode": "NonIndexed",
        "suspend": False,
        "podReplacementPolicy": replace,
    }
    if "completions" not in spec and "parallelism" not in spec:
        defaults["completions"] = 1
    return {**defaults, **spec}


def _job_causes(spec: Object) -> list[Cause]:
    causes = [
        Cause.forbidden(f"spec.{field}", "not supported by the embedded API server")
        for field in UNSUPPORTED_JOB_FIELDS
        if spec.get(field)
    ]
    template = spec.get("template")
    if not isinstance(template, dict):
        return [*causes, Cause.required("spec.template")]
    restart = template.get("spec", {}).get("restartPolicy", "Always")
    if restart not in ("OnFailure", "Never"):
        path = "spec.template.spec.restartPolicy"
        causes.append(Cause.unsupported(path, restart, ("OnFailure", "Never")))
    # Without both, `completions` defaults to 1.
    is_open_ended = spec.get("completions") is None and "parallelism" in spec
    if spec.get("completionMode") == "Indexed" and is_open_ended:
        detail = "when completion mode is Indexed"
        causes.append(Cause.required("spec.completions", detail))
    policy = spec.get("podFailurePolicy")
    if policy and restart != "Never":
        detail = 'only "Never" is supported when podFailurePolicy is specified'
        causes.append(Cause.invalid("spec.template.spec.restartPolicy", restart, detail))
    if policy and spec.get("podReplacementPolicy", "Failed") != "Failed":
        path, value = "spec.podReplacementPolicy", spec["podReplacementPolicy"]
        causes.append(Cause.unsupported(path, value, ("Failed",)))
    actions = ("FailJob", "Ignore", "Count", "FailIndex")
    for i, rule in enumerate(policy["rules"] if policy else ()):
        path = f"spec.podFailurePolicy.rules[{i}].action"
        if rule["action"] not in actions:
            causes.append(Cause.unsupported(path, rule["action"], actions))
        elif rule["action"] == "FailIndex" and spec.get("backoffLimitPerIndex") is None:
            detail = "requires the backoffLimitPerIndex to be set"
            causes.append(Cause.invalid(path, rule["action"], detail))
    return [*causes, *_index_causes(spec)]


def _index_causes(spec: Object) -> list[Cause]:
    """What is wrong with the fields that only an Indexed Job may have."""
    causes = []
    if spec.get("completionMode") != "Indexed":
        for field in ("backoffLimitPerIndex", "successPolicy"):
            if spec.get(field) is not None:
                detail = "requires indexed completion mode"
                causes.append(Cause.invalid(f"spec.{field}", spec[field], detail))
    most = spec.get("maxFailedIndexes")
    if most is not None and spec.get("backoffLimitPerIndex") is None:
        causes.append(Cause.required("spec.backoffLimitPerIndex", "when maxFailedIndexes is set"))
    if most is not None and most > (spec.get("completions") or 0):
        detail = "must be less than or equal to completions"
        causes.append(Cause.invalid("spec.maxFailedIndexes", most, detail))
    return causes


def _revise_job(old: Object, new: Object) -> Object:
    new = {**new, "spec": _job_defaults(new.get("spec", {}))}
    fixed = ["selector", "completionMode", "podFailurePolicy"]
    fixed += ["backoffLimitPerIndex", "successPolicy"]
    if old["spec"]["completionMode"] == "NonIndexed":
        fixed.append("completions")
    # A job that never started may still be told where to run, as queueing controllers do.
    if not old["spec"]["suspend"] or "startTime" in old["status"]:
        fixed.append("template")
    _refuse_changes(JOBS, old, new, fixed)
    return new


# CustomResourceDefinitions


def _prepare_crd(obj: Object) -> Object:
    spec = _crd_spec(obj)
    metadata = obj["metadata"]
    finalizers = metadata.get("finalizers", [])
    if CRD_CLEANUP_FINALIZER not in finalizers:
        metadata = {**metadata, "finalizers": [*finalizers, CRD_CLEANUP_FINALIZER]}
    since = metadata["creationTimestamp"]
    conditions = [
        {
            "type": kind,
            "status": "True",
            "lastTransitionTime": since,
            "reason": reason,
            "message": message,
        }
        for kind, reason, message in (
            ("NamesAccepted", "NoConflicts", "no conflicts found"),
            ("Established", "InitialNamesAccepted", "the initial names have been accepted"),
        )
    ]
    status = {
        "conditions": conditions,
        "acceptedNames": spec["names"],
        "storedVersions": [each["name"] for each in spec["versions"] if each["storage"]],
    }
    return {**obj, "metadata": metadata, "spec": spec, "status": status}


def _crd_spec(obj: Object) -> Object:
    spec = obj.get("spec") or {}
    names, versions = spec.get("names") or {}, spec.get("versions") or []
    causes = [
        Cause.required(path)
        for path, value in (
            ("spec.group", spec.get("group")),
            ("spec.scope", spec.get("scope")),
            ("spec.names.plural", names.get("plural")),
            ("spec.names.kind", names.get("kind")),
        )
        if not value
    ]
    if sum(bool(each.get("storage")) for each in versions) != 1:
        detail = "must have exactly one version marked as storage version"
        causes.append(Cause.invalid("spec.versions", None, detail))
    for i, version in enumerate(versions):
        if "openAPIV3Schema" not in (version.get("schema") or {}):
            path = f"spec.versions[{i}].schema.openAPIV3Schema"
            causes.append(Cause.required(path, "schemas are required"))
        causes += _column_causes(version, f"spec.versions[{i}]")
    name = obj["metadata"]["name"]
    if name != f"{names.get('plural')}.{spec.get('group')}":
        detail = 'must be spec.names.plural+"."+spec.group'
        causes.append(Cause.invalid("metadata.name", name, detail))
    if causes:
        raise invalid_object(CRDS, name, *causes)
    kind = names["kind"]
    names = {"singular": kind.lower(), "listKind": f"{kind}List", **names}
    return {"conversion": {"strategy": "None"}, **spec, "names": names}


def _column_causes(version: Object, path: str) -> list[Cause]:
    causes = []
    for i, column in enumerate(version.get("additionalPrinterColumns", ())):
        try:
            parse_path(column["jsonPath"])
        except ValueError as error:
            field = f"{path}.additionalPrinterColumns[{i}].jsonPath"
            causes.append(Cause.invalid(field, column["jsonPath"], str(error)))
    return causes


def _revise_crd(old: Object, new: Object) -> Object:
    new = {**new, "spec": _crd_spec(new)}
    _refuse_changes(CRDS, old, new, ["group", "scope"])
    return new


def _refuse_changes(resource: Resource, old: Object, new: Object, fields: list[str]) -> None:
    causes = [
        Cause.invalid(f"spec.{field}", new["spec"].get(field), "field is immutable")
        for field in fields
        if old["spec"].get(field) != new["spec"].get(field)
    ]
    if causes:
        raise invalid_object(resource, new["metadata"]["name"], *causes)


_PREPARE: Mapping[StorageKey, Callable[[Object], Object]] = {
    NAMESPACES.storage: _prepare_namespace,
    PODS.storage: _prepare_pod,
    JOBS.storage: _prepare_job,
    CRDS.storage: _prepare_crd,
    ("", "secrets"): _prepare_secret,
    ("", "persistentvolumeclaims"): _prepare_claim,
    ("", "persistentvolumes"): _prepare_volume,
}
_REVISE: Mapping[StorageKey, Callable[[Object, Object], Object]] = {
    JOBS.storage: _revise_job,
    CRDS.storage: _revise_crd,
    ("", "secrets"): _revise_data,
    ("", "configmaps"): _revise_data,
}
