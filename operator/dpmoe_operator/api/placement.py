"""Size and place of a job's pods: a closed list, so that no other field of a pod can be set."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dpmoe_operator.api.base import (
    ApiModel,
    DnsLabel,
    DnsName,
    LabelKey,
    Labels,
    LabelValue,
    SpecError,
)

Quantity = Annotated[
    str, Field(pattern=r"^[0-9]{1,9}(\.[0-9]{1,3})?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$", max_length=16)
]


class Resources(ApiModel):
    """CPU, memory and scratch of each pod; requests and limits alike."""

    cpu: Quantity | None = None
    memory: Quantity | None = None
    ephemeral_storage: Quantity | None = None
    shared_memory: Quantity = "1Gi"


class Toleration(ApiModel):
    """A Kubernetes toleration."""

    key: LabelKey | None = None
    operator: Literal["Exists", "Equal"] = "Equal"
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: Annotated[int, Field(ge=0, le=31_536_000)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        place = "spec.placement.tolerations"
        if self.operator == "Exists" and self.value:
            raise SpecError(f"{place}.value", self.value, "must be absent for operator Exists")
        if self.operator == "Equal" and not self.key:
            raise SpecError(f"{place}.key", self.key, "must be set for operator Equal")
        if self.toleration_seconds is not None and self.effect != "NoExecute":
            raise SpecError(
                f"{place}.effect", self.effect, "must be NoExecute for tolerationSeconds"
            )
        return self


_VALUES = {
    "In": (1, 64),
    "NotIn": (1, 64),
    "Exists": (0, 0),
    "DoesNotExist": (0, 0),
    "Gt": (1, 1),
    "Lt": (1, 1),
}
"""How many values each operator takes."""


class NodeRequirement(ApiModel):
    """A Kubernetes node selector requirement."""

    key: LabelKey
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
    values: Annotated[list[LabelValue], Field(max_length=64)] = []

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        least, most = _VALUES[self.operator]
        if not least <= len(self.values) <= most:
            raise SpecError(
                "spec.placement.nodes.values",
                self.values,
                f"must be {least} to {most} values for operator {self.operator}",
            )
        return self


class Placement(ApiModel):
    """Which nodes the pods may run on. This list is closed: no other pod field can be set.

    `required_nodes` and `preferred_nodes` become one node selector term each.

    Attributes:
        queue_name: Kueue's LocalQueue in the blocks' namespace that the pods wait in for their
            GPUs, once the job has its budget.
        start_timeout_seconds: how long the pods may wait for nodes, after the job got its budget
            and Kueue, where it has a queue, let it start; then the budget returns. The operator's
            default if absent.
    """

    node_selector: Labels = {}
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = []
    required_nodes: Annotated[list[NodeRequirement], Field(max_length=32)] = []
    preferred_nodes: Annotated[list[NodeRequirement], Field(max_length=32)] = []
    priority_class_name: DnsName | None = None
    runtime_class_name: DnsName | None = None
    queue_name: DnsLabel | None = None
    start_timeout_seconds: Annotated[int, Field(ge=1, le=315_360_000)] | None = None
