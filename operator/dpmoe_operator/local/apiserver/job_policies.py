"""What a Job's `podFailurePolicy` and `successPolicy` say: pure."""

from collections.abc import Sequence

from .job_pods import parse_indexes
from .resources import Object


def failure_action(job: Object, pod: Object) -> tuple[str, str]:
    """The action of the first rule of the podFailurePolicy that matches, and why."""
    policy = job["spec"].get("podFailurePolicy") or {"rules": []}
    place = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
    for i, rule in enumerate(policy["rules"]):
        tail = f"matching {rule['action']} rule at index {i}"
        if "onExitCodes" in rule:
            match = _matching_exit(rule["onExitCodes"], pod)
            if match:
                container, code = match
                why = f"Container {container} for pod {place} failed with exit code {code} {tail}"
                return rule["action"], why
        else:
            condition = _matching_condition(rule.get("onPodConditions", ()), pod)
            if condition:
                return rule["action"], f"Pod {place} has condition {condition} {tail}"
    return "Count", ""


def _matching_exit(requirement: Object, pod: Object) -> tuple[str, int] | None:
    status = pod["status"]
    containers = [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]
    for container in containers:
        code = container.get("state", {}).get("terminated", {}).get("exitCode", 0)
        named = requirement.get("containerName") in (None, container["name"])
        listed = code in requirement["values"]
        if named and code != 0 and listed == (requirement["operator"] == "In"):
            return container["name"], code
    return None


def _matching_condition(patterns: Sequence[Object], pod: Object) -> str:
    for pattern in patterns:
        for condition in pod["status"].get("conditions", ()):
            same_status = condition["status"] == pattern.get("status", "True")
            if condition["type"] == pattern["type"] and same_status:
                return str(pattern["type"])
    return ""


def matched_rule(policy: Object | None, succeeded: set[int]) -> int | None:
    """The first rule of a success policy that the succeeded indexes fulfil."""
    for i, rule in enumerate((policy or {}).get("rules", ())):
        meant = succeeded
        if "succeededIndexes" in rule:
            wanted = parse_indexes(rule["succeededIndexes"])
            meant = succeeded & wanted
        else:
            wanted = set()
        if len(meant) >= rule.get("succeededCount", len(wanted)):
            return i
    return None
