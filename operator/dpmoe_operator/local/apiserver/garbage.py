"""What happens after a deletion: dependents, contents of namespaces, objects of removed CRDs.

The collector keeps an index from owners to dependents and follows every write, so its cost is per
change and never per object. Like the real one it decides by uid, in the dependent's namespace
or among cluster-scoped owners, and works in the background: a deletion's answer comes first.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from .cluster import Cluster
from .deletion import FOREGROUND_FINALIZER, ORPHAN_FINALIZER, Deletion
from .kinds import CRD_CLEANUP_FINALIZER
from .resources import CRDS, NAMESPACES, Object, Resource, StorageKey
from .store import Event
from .workqueue import WorkQueue


@dataclass(frozen=True)
class Ref:
    """Where an object is kept."""

    storage: StorageKey
    namespace: str
    name: str

    @classmethod
    def of(cls, storage: StorageKey, obj: Object) -> "Ref":
        """The place of a stored object."""
        return cls(storage, obj["metadata"].get("namespace", ""), obj["metadata"]["name"])


class OwnerIndex:
    """Which objects there are, by uid, and which name which owners."""

    def __init__(self) -> None:
        self.by_uid: dict[str, Ref] = {}
        self._dependents: dict[str, dict[Ref, None]] = {}

    def dependents(self, uid: str) -> list[Ref]:
        """The objects that name the owner with this uid, oldest first."""
        return list(self._dependents.get(uid, ()))

    def record(self, ref: Ref, event: Event) -> None:
        """Follows one write."""
        metadata = event.current.object["metadata"]
        before = owner_uids(event.previous.object) if event.previous else set()
        after = set() if event.type == "DELETED" else owner_uids(event.current.object)
        for uid in before - after:
            self._dependents[uid].pop(ref, None)
            if not self._dependents[uid]:
                del self._dependents[uid]
        for uid in after - before:
            self._dependents.setdefault(uid, {})[ref] = None
        if event.type == "DELETED":
            self.by_uid.pop(metadata["uid"], None)
        else:
            self.by_uid[metadata["uid"]] = ref


class GarbageCollector:
    """Deletes what was left behind."""

    def __init__(self, cluster: Cluster, owners: OwnerIndex) -> None:
        self._cluster = cluster
        self._owners = owners
        # Of namespaces and CRDs whose objects have all been asked to go.
        self._swept: set[str] = set()
        self.queue: WorkQueue[Ref] = WorkQueue(self._collect)

    def observe(self, ref: Ref, event: Event) -> None:
        """Notes what a write may have left to do. Call after the index has recorded it."""
        metadata = event.current.object["metadata"]
        before = owner_uids(event.previous.object) if event.previous else set()
        after = owner_uids(event.current.object)
        if event.type == "DELETED":
            self._add(self._owners.dependents(metadata["uid"]))
            self._add_container_of(ref)
        elif "deletionTimestamp" in metadata or after - before:
            self.queue.add(ref)
        if event.type != "ADDED":
            # An owner that waits for its dependents may be waiting for this one.
            self._add(self._owners.by_uid[uid] for uid in before if uid in self._owners.by_uid)

    def _add(self, refs: Iterable[Ref]) -> None:
        for ref in refs:
            self.queue.add(ref)

    def _add_container_of(self, ref: Ref) -> None:
        """A namespace or CRD that is being deleted waits for the last of its objects."""
        crd_name = f"{ref.storage[1]}.{ref.storage[0]}"
        for container in (
            Ref(NAMESPACES.storage, "", ref.namespace),
            Ref(CRDS.storage, "", crd_name),
        ):
            obj = self._get(container)
            if obj is not None and "deletionTimestamp" in obj["metadata"]:
                self.queue.add(container)

    def _collect(self, ref: Ref) -> None:
        obj = self._get(ref)
        if obj is None:
            return
        metadata = obj["metadata"]
        if "deletionTimestamp" not in metadata:
            self._check_owners(ref, obj)
            return
        finalizers = metadata.get("finalizers", ())
        if ORPHAN_FINALIZER in finalizers:
            self._orphan(ref, metadata["uid"])
        if FOREGROUND_FINALIZER in finalizers:
            self._delete_dependents(ref, metadata["uid"])
        if ref.storage == NAMESPACES.storage:
            self._empty_namespace(ref, metadata["uid"])
        if ref.storage == CRDS.storage:
            self._empty_crd(ref, obj)

    # Owners and dependents

    def _check_owners(self, ref: Ref, obj: Object) -> None:
        """Deletes an object whose owners are all gone, or takes the gone ones off its list."""
        references = obj["metadata"].get("ownerReferences", [])
        alive = [each for each in references if self._owner_is_alive(ref, each["uid"])]
        if not references or len(alive) == len(references):
            return
        if alive:
            self._keep_owners(ref, {each["uid"] for each in alive})
            return
        foreground = any(self._is_waiting(each["uid"]) for each in references)
        has_dependents = bool(self._owners.dependents(obj["metadata"]["uid"]))
        policy = "Foreground" if foreground and has_dependents else "Background"
        self._delete(ref, policy)

    def _owner_is_alive(self, dependent: Ref, uid: str) -> bool:
        owner = self._owners.by_uid.get(uid)
        if owner is None or owner.namespace not in ("", dependent.namespace):
            return False
        return not self._is_waiting(uid)

    def _is_waiting(self, uid: str) -> bool:
        """Whether an owner is being deleted in the foreground."""
        owner = self._owners.by_uid.get(uid)
        obj = self._get(owner) if owner else None
        if obj is None or "deletionTimestamp" not in obj["metadata"]:
            return False
        return FOREGROUND_FINALIZER in obj["metadata"].get("finalizers", ())

    def _keep_owners(self, ref: Ref, uids: set[str]) -> None:
        def change(obj: Object) -> Object:
            kept = [each for each in obj["metadata"]["ownerReferences"] if each["uid"] in uids]
            return {**obj, "metadata": {**obj["metadata"], "ownerReferences": kept}}

        self._cluster.modify(self._resource(ref), ref.namespace, ref.name, change)

    def _orphan(self, ref: Ref, uid: str) -> None:
        for dependent in self._owners.dependents(uid):
            obj = self._get(dependent)
            if obj is not None:
                self._keep_owners(dependent, owner_uids(obj) - {uid})
        self._release(ref, ORPHAN_FINALIZER)

    def _delete_dependents(self, ref: Ref, uid: str) -> None:
        """Foreground: the owner goes once no dependent that blocks it is left."""
        blocked = False
        for dependent in self._owners.dependents(uid):
            obj = self._get(dependent)
            if obj is None:
                continue
            blocked |= any(
                each["uid"] == uid and each.get("blockOwnerDeletion")
                for each in obj["metadata"]["ownerReferences"]
            )
            self.queue.add(dependent)
        if not blocked:
            self._release(ref, FOREGROUND_FINALIZER)

    # Namespaces and CRDs

    def _empty_namespace(self, ref: Ref, uid: str) -> None:
        storages = {each.storage for each in self._cluster.registry if each.namespaced}
        for storage in storages:
            self._sweep(uid, storage, ref.name)
        self._swept.add(uid)
        if all(self._cluster.store.is_empty(storage, ref.name) for storage in storages):
            self._cluster.finalize_namespace(ref.name)

    def _empty_crd(self, ref: Ref, crd: Object) -> None:
        storage = (crd["spec"]["group"], crd["spec"]["names"]["plural"])
        self._sweep(crd["metadata"]["uid"], storage, None)
        self._swept.add(crd["metadata"]["uid"])
        if self._cluster.store.is_empty(storage):
            self._release(ref, CRD_CLEANUP_FINALIZER)

    def _sweep(self, container_uid: str, storage: StorageKey, namespace: str | None) -> None:
        """Deletes what a container holds. Once is enough: nothing new gets in any more."""
        if container_uid in self._swept:
            return
        for stored in list(self._cluster.store.scan(storage, namespace)):
            if "deletionTimestamp" not in stored.object["metadata"]:
                self._delete(Ref.of(storage, stored.object), "Background")

    # Access

    def _resource(self, ref: Ref) -> Resource:
        return self._cluster.registry.of_storage(ref.storage)

    def _get(self, ref: Ref) -> Object | None:
        stored = self._cluster.store.get(ref.storage, ref.namespace, ref.name)
        return stored.object if stored else None

    def _delete(self, ref: Ref, policy: str) -> None:
        self._cluster.delete(self._resource(ref), ref.namespace, ref.name, Deletion(policy))

    def _release(self, ref: Ref, finalizer: str) -> None:
        self._cluster.release(self._resource(ref), ref.namespace, ref.name, finalizer)


def owner_uids(obj: Object) -> set[str]:
    """The uids of an object's owners."""
    return {each["uid"] for each in obj["metadata"].get("ownerReferences", ())}
