"""Every call that the operator makes to the API server, as (group, resource, verb).

Read off dpmoe_operator/kube. The chart's RBAC must be exactly this: a missing right breaks the
operator, and one too many is what a stolen token gets. A new call is written down here first.
"""

Call = tuple[str, str, str]

CLUSTER: frozenset[Call] = frozenset(
    {
        # kube/operator.py: kopf's watches, and the lists beside them
        ("dpmoe.dev", "privateblocks", "list"),
        ("dpmoe.dev", "privateblocks", "watch"),
        ("dpmoe.dev", "dpmoejobs", "list"),
        ("dpmoe.dev", "dpmoejobs", "watch"),
        # kube/apply.py: SetStatus, DeleteJob and its events
        ("dpmoe.dev", "privateblocks/status", "patch"),
        ("dpmoe.dev", "dpmoejobs/status", "patch"),
        ("dpmoe.dev", "dpmoejobs", "delete"),
        ("events.k8s.io", "events", "create"),
    }
)
"""In every namespace."""

LEDGER: frozenset[Call] = frozenset(
    {
        # kube/store.py
        ("dpmoe.dev", "ledgerentries", "get"),
        ("dpmoe.dev", "ledgerentries", "list"),
        ("dpmoe.dev", "ledgerentries", "create"),
        ("dpmoe.dev", "ledgerentries", "delete"),
        # kube/lease.py
        ("coordination.k8s.io", "leases", "get"),
        ("coordination.k8s.io", "leases", "create"),
        ("coordination.k8s.io", "leases", "update"),
    }
)
"""In the operator's namespace."""

DATA: frozenset[Call] = frozenset(
    {
        # kube/workloads.py and kube/loop.py
        ("batch", "jobs", "list"),
        ("batch", "jobs", "watch"),
        ("", "pods", "list"),
        ("", "pods", "watch"),
        # kube/apply.py: Prepare creates, or reads what an earlier try created
        ("batch", "jobs", "get"),
        ("batch", "jobs", "create"),
        ("", "configmaps", "get"),
        ("", "configmaps", "create"),
        ("", "services", "get"),
        ("", "services", "create"),
        ("networking.k8s.io", "networkpolicies", "get"),
        ("networking.k8s.io", "networkpolicies", "create"),
        ("scheduling.k8s.io", "podgroups", "get"),
        ("scheduling.k8s.io", "podgroups", "create"),
        # kube/apply.py: Release, Pause and Stop, Remove
        ("batch", "jobs", "patch"),
        ("batch", "jobs", "delete"),
    }
)
"""In each data namespace."""
