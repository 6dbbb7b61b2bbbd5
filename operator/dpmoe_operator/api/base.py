"""What all models of the API share: strictness, naming, amounts as decimal strings, and errors.

Numbers that money-like arithmetic depends on (ε, δ, σ, C) are decimal strings: a JSON float would
be rounded by every client it passes through.
"""

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

T = TypeVar("T")

GROUP = "dpmoe.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

EpsilonString = Annotated[
    str, Field(pattern=r"^(0|[1-9][0-9]{0,3})(\.[0-9]{1,9})?$", max_length=14)
]
"""ε as a decimal string: up to 9999.999999999."""

DeltaString = Annotated[
    str, Field(pattern=r"^(0\.[0-9]{1,30}|[1-9](\.[0-9]{1,9})?[eE]-[0-9]{1,3})$", max_length=32)
]
"""δ as a decimal string below 1, plain (0.00001) or with an exponent (1e-5)."""

DecimalString = Annotated[
    str,
    Field(
        pattern=r"^((0|[1-9][0-9]{0,8})(\.[0-9]{1,12})?|[1-9](\.[0-9]{1,9})?[eE]-[0-9]{1,2})$",
        max_length=32,
    ),
]
"""A non-negative decimal number, plain or with a negative exponent."""

UtilityString = Annotated[str, Field(pattern=r"^(1|0\.[0-9]{1,6})$", max_length=8)]
"""A part of the whole utility of a job, at most 1."""

DnsLabel = Annotated[
    str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", min_length=1, max_length=63)
]
DnsName = Annotated[
    str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", min_length=1, max_length=253)
]
ColumnName = Annotated[str, Field(min_length=1, max_length=253)]
RelativePath = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_.@=+-]+(/[A-Za-z0-9_.@=+-]+)*$", min_length=1, max_length=512)
]
"""A path below a volume's root. `..` is refused by `refuse_parent_steps`."""

AbsolutePath = Annotated[
    str, Field(pattern=r"^(/[A-Za-z0-9_.@=+-]+)+$", min_length=2, max_length=512)
]
Uri = Annotated[
    str,
    Field(
        pattern=r"^[a-z][a-z0-9+.-]*://[A-Za-z0-9_.@:=+-]+(/[A-Za-z0-9_.@=+-]+)*/?$",
        max_length=512,
    ),
]
"""A URI of plain characters: no escape, query or fragment that a client may read its own way."""

ImageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$", max_length=512)]
LabelKey = Annotated[
    str,
    Field(
        pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$",
        min_length=1,
        max_length=317,
    ),
]
LabelValue = Annotated[
    str, Field(pattern=r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$", max_length=63)
]
Labels = Annotated[dict[LabelKey, LabelValue], Field(max_length=64)]
MessageText = Annotated[str, Field(max_length=2048)]
ReasonName = Annotated[
    str, Field(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", max_length=128)
]
Timestamp = Annotated[str, Field(max_length=32, json_schema_extra={"format": "date-time"})]


class ApiModel(BaseModel):
    """Base of every model: immutable, camelCase on the wire, unknown fields are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=to_camel,
        populate_by_name=True,
        allow_inf_nan=False,
    )

    def to_object(self) -> dict[str, Any]:
        """The model as a JSON object, absent fields left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class StatusModel(ApiModel):
    """Base of status models: fields that a newer operator wrote are dropped, not refused."""

    model_config = ConfigDict(extra="ignore")


class Condition(StatusModel):
    """A Kubernetes condition (API conventions, "Typical status properties")."""

    type: Annotated[str, Field(max_length=316)]
    status: Literal["True", "False", "Unknown"]
    reason: ReasonName
    message: MessageText = ""
    last_transition_time: Timestamp
    observed_generation: Annotated[int, Field(ge=0)] = 0


Conditions = Annotated[
    list[Condition],
    Field(
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    ),
]


def list_map(*keys: str, max_length: int) -> Any:
    """Field of a list whose items are told apart by `keys` (server-side apply merges by them)."""
    return Field(
        max_length=max_length,
        json_schema_extra={
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": list(keys),
        },
    )


def _refuse_repeats(items: list[T]) -> list[T]:
    seen: list[T] = []
    for item in items:
        if item in seen:
            raise ValueError(f"must not repeat {item!r}")
        seen.append(item)
    return items


DISTINCT = AfterValidator(_refuse_repeats)
"""Refuses a list that repeats an item. Goes with `list_set`, which tells the API server to."""


def list_set(*, max_length: int, min_length: int = 0) -> Any:
    """Field of a list of distinct scalars."""
    return Field(
        max_length=max_length,
        min_length=min_length,
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )


class SpecError(ValueError):
    """A manifest that says something that cannot hold. Names the field, the value, the remedy."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        self.field, self.value, self.remedy = field, value, remedy
        super().__init__(f"{field}: {value!r}: {remedy}")


M = TypeVar("M", bound=BaseModel)

_REMEDIES = {
    "missing": "set the field",
    "extra_forbidden": "remove the field, this version has none of that name",
}
"""What to do about errors of pydantic whose own words do not say it."""


def parse(model: type[M], content: Mapping[str, Any], *, at: str = "spec") -> M:
    """Parse `content`, turning the first error of pydantic into a `SpecError`.

    Raises:
        SpecError: the content is not a valid `model`.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, SpecError):
            raise cause from None
        field = ".".join([at, *(str(part) for part in first["loc"])])
        value = "absent" if first["type"] == "missing" else _shortened(first["input"])
        message = first["msg"].removeprefix("Value error, ")
        remedy = _REMEDIES.get(first["type"])
        raise SpecError(field, value, f"{message}; {remedy}" if remedy else message) from None


def _shortened(value: object) -> object:
    text = repr(value)
    return value if len(text) <= 120 else text[:117] + "..."


def decimal(text: str) -> Decimal:
    """The number that a checked decimal string holds."""
    return Decimal(text)


def positive(field: str, text: str | None) -> None:
    """Refuse a decimal string that holds zero."""
    if text is not None and Decimal(text) <= 0:
        raise SpecError(field, text, "must be greater than 0")


def refuse_parent_steps(field: str, paths: Iterable[str | None]) -> None:
    """Refuse `.` and `..` in paths: a path stays below the volume that the owner opened."""
    for path in paths:
        if path is not None and any(part in ("..", ".") for part in path.split("/")):
            raise SpecError(field, path, "must not contain '.' or '..' as a step")


def exactly_one(field: str, alternatives: Mapping[str, object]) -> None:
    """Refuse unless exactly one of the alternatives is set."""
    present = [name for name, value in alternatives.items() if value is not None]
    if len(present) != 1:
        raise SpecError(
            field,
            ", ".join(present) or "nothing",
            f"must set exactly one of {', '.join(alternatives)}",
        )
