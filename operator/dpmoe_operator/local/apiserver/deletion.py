"""How objects are marked for deletion, and when they may go. Pure."""

from dataclasses import dataclass

from . import errors, metadata
from .resources import JOBS, NAMESPACES, PODS, Object, Resource

FOREGROUND_FINALIZER = "foregroundDeletion"
ORPHAN_FINALIZER = "orphan"
_FINALIZER_OF_POLICY = {"Foreground": FOREGROUND_FINALIZER, "Orphan": ORPHAN_FINALIZER}


@dataclass(frozen=True)
class Deletion:
    """How to delete.

    Attributes:
        policy: `Background`, `Foreground`, `Orphan`, or None for the kind's default.
        grace_seconds: what a pod's processes get to end; None for the pod's own value.
        uid: delete only the object with this uid.
        revision: delete only the object with this resourceVersion.
        dry_run: do everything but delete.
    """

    policy: str | None = None
    grace_seconds: int | None = None
    uid: str | None = None
    revision: str | None = None
    dry_run: bool = False


BACKGROUND = Deletion("Background")


def check_preconditions(resource: Resource, obj: Object, how: Deletion) -> None:
    """Refuses to delete another object, or another version, than the one that is meant.

    Raises:
        ApiError: 409.
    """
    actual, name = obj["metadata"], obj["metadata"]["name"]
    if how.uid is not None and how.uid != actual["uid"]:
        why = (
            f"the UID in the precondition ({how.uid}) does not match the UID in record "
            f"({actual['uid']}). The object might have been deleted and then recreated"
        )
        raise errors.conflict(resource, name, why)
    if how.revision is not None and how.revision != actual["resourceVersion"]:
        why = (
            f"the ResourceVersion in the precondition ({how.revision}) does not match the "
            f"ResourceVersion in record ({actual['resourceVersion']})"
        )
        raise errors.conflict(resource, name, why)


def marked_for_deletion(resource: Resource, obj: Object, how: Deletion) -> Object:
    """The object with its deletion asked for; `is_released` says whether it may go now."""
    old = obj["metadata"]
    grace = _grace_seconds(resource, obj, how)
    if "deletionTimestamp" in old:
        # A second deletion may only shorten the time that is left.
        grace = min(grace, old.get("deletionGracePeriodSeconds", 0))
        return {**obj, "metadata": {**old, "deletionGracePeriodSeconds": grace}}
    new = {
        **old,
        "deletionTimestamp": metadata.now(),
        "deletionGracePeriodSeconds": grace,
        "finalizers": _finalizers(resource, old, how),
    }
    if not new["finalizers"]:
        del new["finalizers"]
    if "generation" in old:
        new["generation"] = old["generation"] + 1
    marked = {**obj, "metadata": new}
    if resource.storage == NAMESPACES.storage:
        marked["status"] = {**obj["status"], "phase": "Terminating"}
    return marked


def _grace_seconds(resource: Resource, obj: Object, how: Deletion) -> int:
    """Only a pod that was given to a node, and still runs, is deleted gracefully."""
    if resource.storage != PODS.storage or not obj["spec"].get("nodeName"):
        return 0
    if obj["status"].get("phase") in ("Succeeded", "Failed"):
        return 0
    if how.grace_seconds is not None:
        return how.grace_seconds
    return int(obj["spec"].get("terminationGracePeriodSeconds", 30))


def _finalizers(resource: Resource, old: Object, how: Deletion) -> list[str]:
    # Jobs are the one kind whose default, for historical reasons, is to orphan.
    default = "Orphan" if resource.storage == JOBS.storage else "Background"
    kept = [each for each in old.get("finalizers", ()) if each not in _FINALIZER_OF_POLICY.values()]
    added = _FINALIZER_OF_POLICY.get(how.policy or default)
    return [*kept, added] if added else kept


def is_released(obj: Object) -> bool:
    """Whether a deleted object is held by nothing any more."""
    held = obj["metadata"]
    return (
        "deletionTimestamp" in held
        and not held.get("finalizers")
        and not held.get("deletionGracePeriodSeconds")
        and not (obj["kind"] == "Namespace" and obj["spec"].get("finalizers"))
    )
