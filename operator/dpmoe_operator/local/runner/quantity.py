"""Kubernetes quantities, such as "500m" processors or "2Gi" of memory, as exact numbers."""

import re
from decimal import Decimal

from dpmoe_operator.kube.client import Object

_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}
_QUANTITY = re.compile(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([a-zA-Z]*)")


def parse(quantity: str | int | float) -> Decimal:
    """The number that a quantity stands for.

    Example:
        >>> parse("1500m"), parse("2Ki"), parse(4)
        (Decimal('1.500'), Decimal('2048'), Decimal('4'))

    Raises:
        ValueError: it is no quantity.
    """
    match = _QUANTITY.fullmatch(str(quantity))
    if match is None:
        raise ValueError(f"{quantity!r} is no quantity; write for example 500m, 2 or 1Gi")
    number, unit = Decimal(match[1]), match[2]
    if unit in _BINARY:
        return number * (Decimal(2) ** _BINARY[unit])
    if unit in _DECIMAL:
        return number.scaleb(_DECIMAL[unit])
    raise ValueError(f"{quantity!r}: unknown unit {unit!r}")


def request(container: Object, resource: str) -> Decimal:
    """What a container asks for of a resource; its limit where it states no request."""
    resources = container.get("resources") or {}
    for field in ("requests", "limits"):
        if resource in (resources.get(field) or {}):
            return parse(resources[field][resource])
    return Decimal(0)


def pod_requests(pod: Object) -> dict[str, Decimal]:
    """What a pod asks for in all: its containers together, or its hungriest init container."""
    spec = pod["spec"]
    containers, before = spec["containers"], spec.get("initContainers") or []
    names = {
        name
        for container in (*containers, *before)
        for field in ("requests", "limits")
        for name in (container.get("resources") or {}).get(field) or {}
    }
    return {
        name: max(
            sum((request(container, name) for container in containers), Decimal(0)),
            *(request(container, name) for container in before),
            Decimal(0),
        )
        for name in names
    }
