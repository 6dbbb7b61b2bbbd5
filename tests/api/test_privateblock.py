"""PrivateBlock: what a data owner may declare, and in which words the rest is refused."""

from typing import Any

import pytest
from tests.builders import ABSENT, block_spec

from dpmoe_operator.api.base import SpecError, parse
from dpmoe_operator.api.privateblock import PrivateBlockSpec

HUB = {"claim": ABSENT, "format": ABSENT, "huggingFace": {"id": "owner/reviews"}}
ELSEWHERE = {
    "claim": {"claimName": "data", "path": "public.jsonl"},
    "format": "jsonl",
    "textColumn": "text",
    "labelColumn": "label",
}
PARTITION = {"column": "year", "values": ["2024", "2025"]}


def read(**overrides: Any) -> PrivateBlockSpec:
    return parse(PrivateBlockSpec, block_spec(**overrides))


ACCEPTED: dict[str, dict[str, Any]] = {
    "a claim": {},
    "a path": {"dataset": {"claim": ABSENT, "path": "/data/reviews.csv", "format": "csv"}},
    "a hub data set": {"dataset": HUB},
    "token ids": {"dataset": {"textColumn": ABSENT, "tokensColumn": "ids"}},
    "token ids of a hub": {"dataset": {**HUB, "textColumn": ABSENT, "tokensColumn": "ids"}},
    "a partition": {"dataset": {"partition": PARTITION}},
    "an empty partition value": {"dataset": {"partition": {"column": "year", "values": [""]}}},
    "users": {"unit": {"kind": "user", "column": "author"}},
    "orders of its own": {"budget": {"orders": ["1.5", "2", "1024"]}},
    "a delta with an exponent": {"budget": {"delta": "9.99e-5"}},
    "the longest epsilon": {"budget": {"epsilon": "9999.999999999"}},
    "unlocking by arrivals": {"unlocking": {"kind": "arrivals", "arrivals": 10}},
    "unlocking by time": {"unlocking": {"kind": "time", "lifetimeSeconds": 60}},
    "evaluation on another file": {"evaluation": ELSEWHERE},
    "evaluation on other values of the same column": {
        "dataset": {"partition": PARTITION},
        "evaluation": {
            **ELSEWHERE,
            "claim": {"claimName": "data", "path": "reviews.jsonl"},
            "partition": {"column": "year", "values": ["2023"]},
        },
    },
    "no access at all": {"access": []},
    "a retired block": {"retired": True},
    "blocks that share no row": {"disjointFrom": ["reviews-2024", "others"]},
    "a URI for results": {
        "access": [{"namespace": "t", "outputs": [{"uriPrefix": "s3://bucket/team-a/"}]}]
    },
}


@pytest.mark.parametrize("overrides", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_accepts(overrides: dict[str, Any]) -> None:
    read(**overrides)


def access(**fields: Any) -> dict[str, Any]:
    return {"access": [{"namespace": "team-a", **fields}]}


# What is wrong, then the field, the value and the remedy that the message must name.
REFUSED: list[tuple[dict[str, Any], str, str, str]] = [
    ({"dataset": {"path": "/data/a.csv"}}, "spec.dataset", "path, claim", "exactly one of"),
    ({"dataset": {"claim": ABSENT}}, "spec.dataset", "nothing", "exactly one of path, claim"),
    ({"dataset": {"format": ABSENT}}, "spec.dataset.format", "absent", "csv, tsv, jsonl"),
    ({"dataset": {"format": "xlsx"}}, "spec.dataset.format", "xlsx", "'csv', 'tsv'"),
    (
        {"dataset": {"claim": {"path": "../secret.csv"}}},
        "spec.dataset.claim.path",
        "../secret.csv",
        "'..'",
    ),
    ({"dataset": {"claim": {"path": "a/./b"}}}, "spec.dataset.claim.path", "a/./b", "'.'"),
    ({"dataset": {"claim": {"path": "/etc"}}}, "spec.dataset.claim.path", "/etc", "pattern"),
    ({"dataset": {"claim": {"path": "a//b"}}}, "spec.dataset.claim.path", "a//b", "pattern"),
    ({"dataset": {"claim": {"claimName": "A"}}}, "spec.dataset.claim.claimName", "A", "pattern"),
    (
        {"dataset": {"claim": ABSENT, "path": "/data/../etc", "format": "csv"}},
        "spec.dataset.path",
        "/data/../etc",
        "'..'",
    ),
    (
        {"dataset": {"claim": ABSENT, "path": "data.csv", "format": "csv"}},
        "spec.dataset.path",
        "data.csv",
        "pattern",
    ),
    (
        {"dataset": {**HUB, "huggingFace": {"id": "a/b/c"}}},
        "spec.dataset.huggingFace.id",
        "a/b/c",
        "pattern",
    ),
    (
        {"dataset": {**HUB, "huggingFace": {"id": "a/b", "split": "train[:50%]"}}},
        "spec.dataset.huggingFace.split",
        "train[:50%]",
        "pattern",
    ),
    (
        {"dataset": {**HUB, "huggingFace": {"id": "a/b", "revision": ""}}},
        "spec.dataset.huggingFace.revision",
        "",
        "at least 1",
    ),
    ({"dataset": {"textColumn": ABSENT}}, "spec.dataset", "nothing", "textColumn, tokensColumn"),
    (
        {"dataset": {"tokensColumn": "ids"}},
        "spec.dataset",
        "textColumn, tokensColumn",
        "exactly one",
    ),
    (
        {"dataset": {"textColumn": ABSENT, "tokensColumn": "ids", "format": "csv"}},
        "spec.dataset.format",
        "csv",
        "jsonl or parquet where tokensColumn",
    ),
    (
        {"evaluation": {**ELSEWHERE, "tokensColumn": "ids"}},
        "spec.evaluation",
        "textColumn, tokensColumn",
        "exactly one",
    ),
    ({"dataset": {"textColumn": ""}}, "spec.dataset.textColumn", "", "at least 1"),
    ({"dataset": {"labels": 1}}, "spec.dataset.labels", "1", "greater than or equal to 2"),
    ({"dataset": {"units": ABSENT}}, "spec.dataset.units", "absent", "required"),
    ({"dataset": {"units": 0}}, "spec.dataset.units", "0", "greater than or equal to 1"),
    (
        {"dataset": {"partition": {"column": "year", "values": []}}},
        "spec.dataset.partition.values",
        "[]",
        "at least 1",
    ),
    (
        {"dataset": {"partition": {"column": "year", "values": ["1", "1"]}}},
        "spec.dataset.partition.values",
        "'1'",
        "must not repeat",
    ),
    (
        {"dataset": {"partition": {"column": "name", "values": [f"{i:0100}" for i in range(12)]}}},
        "spec.dataset.partition.values",
        "characters",
        "fewer or shorter",
    ),
    ({"dataset": {"colour": "red"}}, "spec.dataset.colour", "red", "Extra inputs"),
    ({"unit": {"kind": "user"}}, "spec.unit.column", "None", "must be set for kind user"),
    ({"unit": {"column": "author"}}, "spec.unit.column", "author", "only for it"),
    ({"unit": {"kind": "city"}}, "spec.unit.kind", "city", "'example' or 'user'"),
    ({"budget": {"epsilon": "0"}}, "spec.budget.epsilon", "'0'", "greater than 0"),
    ({"budget": {"epsilon": "0.000"}}, "spec.budget.epsilon", "'0.000'", "greater than 0"),
    ({"budget": {"epsilon": "-1"}}, "spec.budget.epsilon", "'-1'", "pattern"),
    ({"budget": {"epsilon": "1e3"}}, "spec.budget.epsilon", "1e3", "pattern"),
    ({"budget": {"epsilon": "10000"}}, "spec.budget.epsilon", "10000", "pattern"),
    ({"budget": {"epsilon": 10}}, "spec.budget.epsilon", "10", "valid string"),
    ({"budget": {"epsilon": 0.1}}, "spec.budget.epsilon", "0.1", "valid string"),
    ({"budget": {"epsilon": "1.0\n"}}, "spec.budget.epsilon", "1.0", "pattern"),
    ({"budget": {"epsilon": "١"}}, "spec.budget.epsilon", "١", "pattern"),
    ({"budget": {"delta": "0.0"}}, "spec.budget.delta", "'0.0'", "greater than 0"),
    ({"budget": {"delta": "1"}}, "spec.budget.delta", "'1'", "pattern"),
    ({"budget": {"delta": "1e5"}}, "spec.budget.delta", "1e5", "pattern"),
    ({"budget": {"delta": "0.0001"}}, "spec.budget.delta", "0.0001", "below 1/units = 1/10000"),
    ({"budget": {"orders": []}}, "spec.budget.orders", "[]", "at least 1"),
    ({"budget": {"orders": ["1"]}}, "spec.budget.orders", "['1']", "within (1, 1024]"),
    ({"budget": {"orders": ["1025"]}}, "spec.budget.orders", "1025", "within (1, 1024]"),
    ({"budget": {"orders": ["4", "2"]}}, "spec.budget.orders", "['4', '2']", "increase"),
    ({"budget": {"orders": ["2", "2.0"]}}, "spec.budget.orders", "['2', '2.0']", "increase"),
    ({"budget": {"orders": ["2", "2"]}}, "spec.budget.orders", "'2'", "must not repeat"),
    ({"budget": {"conversion": "loose"}}, "spec.budget.conversion", "loose", "'classic' or"),
    (
        {"unlocking": {"kind": "arrivals"}},
        "spec.unlocking.arrivals",
        "None",
        "set for kind arrivals",
    ),
    ({"unlocking": {"arrivals": 3}}, "spec.unlocking.arrivals", "3", "only there"),
    (
        {"unlocking": {"kind": "time"}},
        "spec.unlocking.lifetimeSeconds",
        "None",
        "set for kind time",
    ),
    ({"unlocking": {"lifetimeSeconds": 3}}, "spec.unlocking.lifetimeSeconds", "3", "only there"),
    (
        {"evaluation": {**ELSEWHERE, "format": ABSENT}},
        "spec.evaluation.format",
        "absent",
        "csv, tsv",
    ),
    (
        {"evaluation": {**ELSEWHERE, "path": "/x.csv"}},
        "spec.evaluation",
        "path, claim",
        "exactly one",
    ),
    ({"retired": "yes please"}, "spec.retired", "yes please", "boolean"),
    ({"disjointFrom": ["a", "a"]}, "spec.disjointFrom", "'a'", "must not repeat"),
    ({"disjointFrom": ["vault/a"]}, "spec.disjointFrom.0", "vault/a", "pattern"),
    ({"disjointFrom": [f"b{i}" for i in range(65)]}, "spec.disjointFrom", "b0", "at most 64"),
    ({"access": [{"namespace": "Team"}]}, "spec.access.0.namespace", "Team", "pattern"),
    (
        {"access": [{"namespace": "a"}, {"namespace": "a"}]},
        "spec.access",
        "['a', 'a']",
        "each namespace once",
    ),
    (access(maxEpsilon="0"), "spec.access.maxEpsilon", "'0'", "greater than 0"),
    (access(images=["a", "a"]), "spec.access.0.images", "'a'", "must not repeat"),
    (access(images=["; rm -rf"]), "spec.access.0.images.0", "rm", "pattern"),
    (access(models=["m", "m"]), "spec.access.0.models", "'m'", "must not repeat"),
    (access(outputs=[{}]), "spec.access.outputs", "nothing", "exactly one of claimName"),
    (
        access(checkpoints={"claimName": "c"}, outputs=[{"claimName": "c"}]),
        "spec.access.checkpoints.claimName",
        "'c'",
        "must be a claim of its own",
    ),
    (
        access(checkpoints={"claimName": "m"}, models=["m"]),
        "spec.access.checkpoints.claimName",
        "'m'",
        "must be a claim of its own",
    ),
    (
        access(outputs=[{"claimName": "a", "uriPrefix": "s3://a/"}]),
        "spec.access.outputs",
        "claimName, uriPrefix",
        "exactly one",
    ),
    (
        access(outputs=[{"uriPrefix": "s3://bucket/team"}]),
        "spec.access.outputs.uriPrefix",
        "s3://bucket/team",
        "end with '/'",
    ),
    (
        access(outputs=[{"uriPrefix": "s3://bucket/../"}]),
        "spec.access.outputs.uriPrefix",
        "s3://bucket/../",
        "'..'",
    ),
]


@pytest.mark.parametrize(("overrides", "field", "value", "remedy"), REFUSED)
def test_refuses(overrides: dict[str, Any], field: str, value: str, remedy: str) -> None:
    with pytest.raises(SpecError) as refused:
        read(**overrides)
    assert refused.value.field == field
    message = str(refused.value)
    assert message.startswith(f"{field}: ")
    assert value in message
    assert remedy in message


RELEASES_PRIVATE_ROWS: dict[str, dict[str, Any]] = {
    "the table itself": {"evaluation": {**ELSEWHERE, "claim": {"path": "reviews.jsonl"}}},
    "the table in another format": {
        "evaluation": {**ELSEWHERE, "claim": {"path": "reviews.jsonl"}, "format": "csv"}
    },
    "all of a table of which a part is private": {
        "dataset": {"partition": PARTITION},
        "evaluation": {**ELSEWHERE, "claim": {"path": "reviews.jsonl"}},
    },
    "a part of the table": {
        "evaluation": {**ELSEWHERE, "claim": {"path": "reviews.jsonl"}, "partition": PARTITION}
    },
    "a part that has one value in common": {
        "dataset": {"partition": PARTITION},
        "evaluation": {
            **ELSEWHERE,
            "claim": {"path": "reviews.jsonl"},
            "partition": {"column": "year", "values": ["2023", "2024"]},
        },
    },
    "a part by another column": {
        "dataset": {"partition": PARTITION},
        "evaluation": {
            **ELSEWHERE,
            "claim": {"path": "reviews.jsonl"},
            "partition": {"column": "fold", "values": ["test"]},
        },
    },
    "the folder that the table is in": {
        "dataset": {"claim": {"path": "all/reviews.jsonl"}},
        "evaluation": {**ELSEWHERE, "claim": {"path": "all"}},
    },
}


@pytest.mark.parametrize(
    "overrides", RELEASES_PRIVATE_ROWS.values(), ids=RELEASES_PRIVATE_ROWS.keys()
)
def test_evaluation_may_not_hold_private_rows(overrides: dict[str, Any]) -> None:
    evaluation = overrides["evaluation"]
    claim = {"claimName": "data", **evaluation["claim"]}
    with pytest.raises(SpecError, match=r"spec\.evaluation: .*must share no row"):
        read(**overrides | {"evaluation": {**evaluation, "claim": claim}})


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(SpecError) as refused:
        read(dataset={"textColumn": "x" * 300})
    assert len(str(refused.value)) < 250


def test_access_is_found_by_namespace() -> None:
    spec = read()
    found = spec.access_of("team-b")
    assert found is not None
    assert found.namespace == "team-b"
    assert spec.access_of("team") is None


def test_specs_are_immutable_and_survive_the_wire() -> None:
    spec = read(dataset={"partition": PARTITION}, unlocking={"kind": "arrivals", "arrivals": 3})
    assert parse(PrivateBlockSpec, spec.to_object()) == spec
    with pytest.raises(ValueError, match="frozen"):
        spec.budget.epsilon = "99"  # type: ignore[misc]
