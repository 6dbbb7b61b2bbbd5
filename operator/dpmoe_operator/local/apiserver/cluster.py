"""What the verbs mean: create, update, patch, delete, on objects of any resource.

Everything here is synchronous, so each call is atomic under asyncio: HTTP handlers and controllers
share one `Cluster` without locks. Objects that come out are shared and must not be changed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from . import errors, kinds, metadata, patches, schema
from .deletion import BACKGROUND, Deletion, check_preconditions, is_released, marked_for_deletion
from .errors import Cause
from .resources import CRDS, NAMESPACES, SERVICE_ACCOUNTS, Object, Registry, Resource
from .selectors import Selection
from .store import Store, Stored


@dataclass
class Write:
    """How to write.

    Attributes:
        dry_run: do everything but store.
        field_validation: what to do about unknown fields: `Ignore`, `Warn` or `Strict`.
        warnings: filled with what the client should be told.
    """

    dry_run: bool = False
    field_validation: str = "Ignore"
    warnings: list[str] = field(default_factory=list)


class Cluster:
    """All objects, and the rules by which they change."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.store = Store()
        for name in ("default", "kube-system", "kube-public", "kube-node-lease"):
            self.create(NAMESPACES, "", {"metadata": {"name": name}})

    # Reading

    def get(self, resource: Resource, namespace: str, name: str) -> Stored:
        """One object.

        Raises:
            ApiError: 404.
        """
        stored = self.store.get(resource.storage, namespace, name)
        if stored is None:
            raise errors.not_found(resource, name)
        return stored

    def select(self, resource: Resource, selection: Selection) -> Iterable[Stored]:
        """The selected objects, ordered by namespace and name."""
        for stored in self.store.scan(resource.storage, selection.namespace):
            if not selection.is_narrow or selection.matches(stored.object):
                yield stored

    # Creating

    def create(
        self, resource: Resource, namespace: str, body: Any, write: Write | None = None
    ) -> Object:
        """Stores a new object and returns it.

        Raises:
            ApiError: 400, 403, 404, 409 or 422, as kube-apiserver would.
        """
        write = write or Write()
        body = _typed(resource, body)
        if resource.namespaced:
            self._check_namespace(resource, namespace, body)
        if resource.custom:
            self._check_definition(resource)
        obj = resource.to_stored(body)
        obj = {**obj, "metadata": metadata.new_metadata(resource, namespace, body["metadata"])}
        if resource.has_status and not kinds.keeps_status_on_create(resource):
            obj.pop("status", None)
        obj = self._admit(resource, obj, write)
        obj = kinds.prepare(resource, obj)
        name = obj["metadata"]["name"]
        if self.store.get(resource.storage, namespace, name) is not None:
            raise errors.already_exists(resource, name)
        if write.dry_run:
            return resource.to_served(obj)
        stored = self.store.put(resource.storage, obj).object
        self._after_create(resource, stored)
        return resource.to_served(stored)

    def _check_namespace(self, resource: Resource, namespace: str, body: Object) -> None:
        found = self.store.get(NAMESPACES.storage, "", namespace)
        if found is None:
            raise errors.not_found(NAMESPACES, namespace)
        if "deletionTimestamp" in found.object["metadata"]:
            name = body["metadata"].get("name", "")
            raise errors.namespace_terminating(resource, name, namespace)

    def _check_definition(self, resource: Resource) -> None:
        crd = self.store.get(CRDS.storage, "", resource.qualified)
        if crd is not None and "deletionTimestamp" in crd.object["metadata"]:
            raise errors.method_not_allowed()

    def _after_create(self, resource: Resource, obj: Object) -> None:
        if resource.storage == CRDS.storage:
            self.registry.define(obj)
            self.store.open((obj["spec"]["group"], obj["spec"]["names"]["plural"]))
        if resource.storage == NAMESPACES.storage:
            account = {"metadata": {"name": "default"}}
            self.create(SERVICE_ACCOUNTS, obj["metadata"]["name"], account)

    # Updating

    def update(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        body: Any,
        subresource: str = "",
        write: Write | None = None,
    ) -> Object:
        """Replaces an object, or its status, and returns it.

        Raises:
            ApiError: 400, 404, 409 or 422.
        """
        body = _typed(resource, body)
        old = self.get(resource, namespace, name).object
        given = body["metadata"]
        _check_identity(namespace, name, given)
        if (given.get("uid") or old["metadata"]["uid"]) != old["metadata"]["uid"]:
            why = f"Precondition failed: UID in precondition: {given['uid']}"
            raise errors.conflict(resource, name, why)
        if resource.custom and not given.get("resourceVersion"):
            cause = Cause.invalid("metadata.resourceVersion", 0, "must be specified for an update")
            raise errors.invalid_object(resource, name, cause)
        return self._replace(resource, old, body, subresource, write or Write())

    def modify(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        change: Callable[[Object], Object],
        subresource: str = "",
        write: Write | None = None,
    ) -> Object:
        """Replaces an object by what `change` makes of it; all patches go through here.

        Raises:
            ApiError: 400, 404, 409 or 422.
        """
        old = self.get(resource, namespace, name).object
        body = _typed(resource, change(resource.to_served(old)))
        _check_identity(namespace, name, body["metadata"])
        uid = body["metadata"].get("uid") or old["metadata"]["uid"]
        if uid != old["metadata"]["uid"]:
            cause = Cause.invalid("metadata.uid", uid, "field is immutable")
            raise errors.invalid_object(resource, name, cause)
        return self._replace(resource, old, body, subresource, write or Write())

    def apply(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        body: bytes,
        subresource: str = "",
        write: Write | None = None,
    ) -> tuple[Object, bool]:
        """Server-side apply without field ownership: creates, or merges.

        Returns:
            The object, and whether it was created.
        """
        applied = _typed(resource, _parse_yaml(body), complete=False)
        given = applied["metadata"]
        if not given.get("name"):
            message = f"the name of the object ({name} based on URL) was undeterminable"
            raise errors.bad_request(f"{message}: name must be provided")
        _check_identity(namespace, name, given)
        if self.store.get(resource.storage, namespace, name) is None:
            if subresource:
                raise errors.not_found(resource, name)
            return self.create(resource, namespace, applied, write), True

        def merge(current: Object) -> Object:
            rules = resource.schema if resource.custom else None
            merged: Object = patches.apply_merge(current, applied, rules, "")
            return merged

        return self.modify(resource, namespace, name, merge, subresource, write), False

    def _replace(
        self, resource: Resource, old: Object, body: Object, subresource: str, write: Write
    ) -> Object:
        name, given = old["metadata"]["name"], body["metadata"]
        if given.get("resourceVersion") not in (None, "", old["metadata"]["resourceVersion"]):
            raise errors.stale(resource, name)
        new = resource.to_stored(body)
        new = {**new, "metadata": metadata.revised_metadata(resource, old["metadata"], given)}
        new = _keep_other_half(resource, old, new, subresource)
        new = self._admit(resource, new, write)
        if not subresource:
            new = kinds.revise(resource, old, new)
        if resource.has_generation and _desired(resource, new) != _desired(resource, old):
            generation = old["metadata"]["generation"] + 1
            new = {**new, "metadata": {**new["metadata"], "generation": generation}}
        if write.dry_run or _same(old, new):
            return resource.to_served(_with_revision(new, old["metadata"]["resourceVersion"]))
        if is_released(new):
            return resource.to_served(self._remove(resource, new))
        stored = self.store.put(resource.storage, new).object
        if resource.storage == CRDS.storage:
            self.registry.define(stored)
        return resource.to_served(stored)

    def _admit(self, resource: Resource, obj: Object, write: Write) -> Object:
        """Prunes, defaults and validates a custom object."""
        if not resource.custom or resource.schema is None:
            return obj
        obj, unknown = schema.prune_object(resource.schema, obj)
        problems = [f'unknown field "{path}"' for path in unknown]
        if problems and write.field_validation == "Strict":
            message = (
                f'{resource.kind} in version "{resource.version}" cannot be handled as a '
                f"{resource.kind}: strict decoding error: {', '.join(problems)}"
            )
            raise errors.bad_request(message)
        if write.field_validation == "Warn":
            write.warnings += problems
        obj = schema.apply_defaults(resource.schema, obj)
        causes = schema.validate(resource.schema, obj)
        if causes:
            raise errors.invalid_object(resource, obj["metadata"]["name"], *causes)
        return obj

    # Deleting

    def delete(
        self, resource: Resource, namespace: str, name: str, how: Deletion = BACKGROUND
    ) -> tuple[Object, bool]:
        """Deletes an object, or marks it if something must happen before.

        Returns:
            The object's last state, and whether it is gone.

        Raises:
            ApiError: 404, or 409 for a failed precondition.
        """
        obj = self.get(resource, namespace, name).object
        check_preconditions(resource, obj, how)
        marked = marked_for_deletion(resource, obj, how)
        gone = is_released(marked)
        if how.dry_run:
            return obj, gone
        if gone:
            return self._remove(resource, marked), True
        if not _same(obj, marked):
            marked = self.store.put(resource.storage, marked).object
        return marked, False

    def release(self, resource: Resource, namespace: str, name: str, finalizer: str) -> None:
        """Removes one finalizer; removes the object if it was the last one of a deleted one."""

        def without(obj: Object) -> Object:
            kept = [each for each in obj["metadata"].get("finalizers", ()) if each != finalizer]
            return {**obj, "metadata": {**obj["metadata"], "finalizers": kept}}

        if self.store.get(resource.storage, namespace, name) is not None:
            self.modify(resource, namespace, name, without)

    def finalize_namespace(self, name: str) -> None:
        """Removes an emptied namespace, unless an object's finalizer still holds it."""
        obj = self.get(NAMESPACES, "", name).object
        emptied = {**obj, "spec": {**obj["spec"], "finalizers": []}}
        if is_released(emptied):
            self._remove(NAMESPACES, emptied)
        else:
            self.store.put(NAMESPACES.storage, emptied)

    def _remove(self, resource: Resource, obj: Object) -> Object:
        removed = self.store.remove(resource.storage, obj).object
        if resource.storage == CRDS.storage:
            self.registry.forget(removed)
            self.store.drop((removed["spec"]["group"], removed["spec"]["names"]["plural"]))
        return removed


def _typed(resource: Resource, body: Any, *, complete: bool = True) -> Object:
    """The body with `kind`, `apiVersion` and `metadata`; refuses those of another resource.

    Built-in objects may leave them out, as Go's typed decoder allows; custom ones may not.
    """
    is_object = isinstance(body, dict) and isinstance(body.get("metadata", {}), dict)
    if not is_object or not (resource.custom or isinstance(body.get("spec", {}), dict)):
        raise errors.bad_request(f"the object provided is not an object of type {resource.kind}")
    strict = resource.custom or not complete
    for name, expected in (("kind", resource.kind), ("apiVersion", resource.api_version)):
        actual = body.get(name)
        if not actual and strict:
            message = f"the object provided is unrecognized (must be of type {resource.kind}): "
            raise errors.bad_request(f"{message}Object '{name}' is missing")
        if actual and actual != expected:
            raise errors.bad_request(
                f'{body.get("kind")} in version "{body.get("apiVersion")}" cannot be handled as a '
                f"{resource.kind}: the {name} of this resource is {expected!r}"
            )
    typed = {"kind": resource.kind, "apiVersion": resource.api_version, **body}
    return {**typed, "metadata": body.get("metadata", {})}


def _parse_yaml(body: bytes) -> Any:
    try:
        return yaml.safe_load(body)
    except yaml.YAMLError as error:
        raise errors.bad_request(f"error decoding YAML: {error}") from None


def _check_identity(namespace: str, name: str, given: Object) -> None:
    """The body of a write must be about the object that the URL names."""
    if (given.get("name") or name) != name:
        message = f"the name of the object ({given['name']}) does not match the name on the URL"
        raise errors.bad_request(f"{message} ({name})")
    if (given.get("namespace") or namespace) != namespace:
        message = f"the namespace of the object ({given['namespace']}) does not match"
        raise errors.bad_request(f"{message} the namespace on the URL ({namespace})")


def _keep_other_half(resource: Resource, old: Object, new: Object, subresource: str) -> Object:
    """Through /status only the status changes, through the main resource all but the status."""
    if subresource == "status":
        # Built-in kinds take labels and annotations by /status too; custom ones do not.
        metadata = old["metadata"] if resource.custom else new["metadata"]
        return _with_status({**old, "metadata": metadata}, new)
    return _with_status(new, old) if resource.has_status else new


def _with_status(obj: Object, status_of: Object) -> Object:
    rest = {name: value for name, value in obj.items() if name != "status"}
    return {**rest, "status": status_of["status"]} if "status" in status_of else rest


def _desired(resource: Resource, obj: Object) -> Object:
    """The part of an object whose changes `generation` counts."""
    ignored = {"metadata", "apiVersion", *(("status",) if resource.has_status else ())}
    return {name: value for name, value in obj.items() if name not in ignored}


def _same(old: Object, new: Object) -> bool:
    """Whether a write would change nothing, and so makes no new version."""
    return old == _with_revision(new, old["metadata"]["resourceVersion"])


def _with_revision(obj: Object, revision: str) -> Object:
    return {**obj, "metadata": {**obj["metadata"], "resourceVersion": revision}}
