"""Label and field selectors: their grammar, and which objects they select.

A `Selection` is everything a list or a watch may narrow down by. Watches apply it to both sides
of a change, so that an object that leaves the selection is reported as deleted.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from . import errors
from .resources import Object, Resource

Labels = Mapping[str, str]
Requirement = Callable[[Labels], bool]

_SET = re.compile(r"(?P<key>[\w./-]+)\s+(?P<not>not)?in\s*\((?P<values>[^()]*)\)")
_COMPARE = re.compile(r"(?P<key>[\w./-]+)\s*(?P<operator>==|!=|=|>|<)\s*(?P<value>[\w.-]*)")
_EXISTS = re.compile(r"(?P<not>!)?\s*(?P<key>[\w./-]+)")
_COMMA_OUTSIDE_PARENTHESES = re.compile(r",(?![^(]*\))")


@dataclass(frozen=True)
class Selection:
    """Which objects of a resource a request is about."""

    namespace: str | None = None
    labels: tuple[Requirement, ...] = ()
    fields: tuple[Callable[[Object], bool], ...] = ()

    def matches(self, stored: Object) -> bool:
        """Whether the stored object is selected."""
        metadata = stored["metadata"]
        if self.namespace is not None and metadata.get("namespace") != self.namespace:
            return False
        if self.labels:
            labels = metadata.get("labels") or {}
            if not all(holds(labels) for holds in self.labels):
                return False
        return all(holds(stored) for holds in self.fields)

    @property
    def is_narrow(self) -> bool:
        """Whether anything but the namespace is selected by."""
        return bool(self.labels or self.fields)


def parse_selection(
    resource: Resource, namespace: str | None, labels: str, fields: str
) -> Selection:
    """Reads the `labelSelector` and `fieldSelector` of a request.

    Raises:
        ApiError: 400 for a selector that can't be read or names an unsupported field.
    """
    return Selection(namespace, parse_labels(labels), parse_fields(resource, fields))


def parse_labels(text: str) -> tuple[Requirement, ...]:
    """Reads a label selector such as `a=b,c!=d,e in (f,g),h,!i`."""
    parts = _COMMA_OUTSIDE_PARENTHESES.split(text) if text.strip() else []
    return tuple(_parse_requirement(part.strip()) for part in parts)


def _parse_requirement(text: str) -> Requirement:
    if match := _SET.fullmatch(text):
        values = {value.strip() for value in match["values"].split(",")}
        return _one_of(match["key"], values, negated=bool(match["not"]))
    if match := _COMPARE.fullmatch(text):
        key, operator, value = match["key"], match["operator"], match["value"]
        if operator in "<>":
            return _compared(key, operator, value)
        return _one_of(key, {value}, negated=operator == "!=")
    if match := _EXISTS.fullmatch(text):
        key, present = match["key"], not match["not"]
        return lambda labels: (key in labels) == present
    raise errors.bad_request(f"unable to parse requirement: {text!r}")


def _one_of(key: str, values: set[str], *, negated: bool) -> Requirement:
    if negated:
        return lambda labels: labels.get(key) not in values
    return lambda labels: labels.get(key) in values


def _compared(key: str, operator: str, value: str) -> Requirement:
    if not re.fullmatch(r"-?\d+", value):
        raise errors.bad_request(f"unable to parse requirement: {value!r} is not an integer")

    def holds(labels: Labels) -> bool:
        try:
            actual = int(labels[key])
        except (KeyError, ValueError):
            return False
        return actual > int(value) if operator == ">" else actual < int(value)

    return holds


def parse_fields(resource: Resource, text: str) -> tuple[Callable[[Object], bool], ...]:
    """Reads a field selector such as `metadata.name=a,status.phase!=Running`."""
    return tuple(_parse_field(resource, part) for part in text.split(",") if part)


def _parse_field(resource: Resource, text: str) -> Callable[[Object], bool]:
    match = re.fullmatch(r"(?P<path>[\w.]+)\s*(?P<operator>==|!=|=)(?P<value>.*)", text.strip())
    if match is None:
        raise errors.bad_request(f"invalid field selector: {text!r}; can't understand it")
    if match["path"] not in ("metadata.name", "metadata.namespace", *resource.fields):
        raise errors.bad_request(f"field label not supported: {match['path']}")
    path, value, negated = match["path"].split("."), match["value"], match["operator"] == "!="
    return lambda stored: (field_text(stored, path) == value) != negated


def field_text(obj: Object, path: list[str]) -> str:
    """The value at a path as field selectors compare it; a missing field is empty."""
    value: object = obj
    for step in path:
        value = value.get(step) if isinstance(value, Mapping) else None
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)
