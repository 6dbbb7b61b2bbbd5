"""Elastic jobs in the API: which points a manifest means, and what is refused."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.builders import ABSENT, job_spec

from dpmoe_operator.api.base import SpecError, parse
from dpmoe_operator.api.dpmoejob import DPMoEJobSpec

EXAMPLE = Path(__file__).parents[2] / "examples" / "extra" / "elastic-job.yaml"


def read(elastic: dict[str, Any], **overrides: Any) -> DPMoEJobSpec:
    base: dict[str, Any] = {
        "blocks": {"names": ["a", "b", "c"]},
        "privacy": {"epsilon": "8", "noiseMultiplier": ABSENT},
    }
    return parse(DPMoEJobSpec, job_spec(**(base | overrides), elastic=elastic))


def points_of(spec: DPMoEJobSpec) -> list[tuple[str | None, int, str]]:
    points = []
    for at, utility in spec.points():
        assert at.blocks.most is not None
        points.append((at.privacy.epsilon, at.blocks.most, utility))
    return points


def test_a_rigid_job_has_one_point() -> None:
    spec = parse(DPMoEJobSpec, job_spec())
    assert spec.points() == [(spec, "1")]


def test_one_point_is_the_lower_end_of_a_range() -> None:
    spec = read({"epsilon": [{"epsilon": "2", "utility": "0.4"}]})
    assert points_of(spec) == [
        ("8", 3, "1"),
        ("6", 3, "0.8"),
        ("4", 3, "0.6"),
        ("2", 3, "0.4"),
    ]


def test_points_between_are_rounded_to_millionths() -> None:
    spec = read({"epsilon": [{"epsilon": "1", "utility": "0.3"}]})
    assert points_of(spec)[1:3] == [("5.666667", 3, "0.766667"), ("3.333333", 3, "0.533333")]


def test_several_points_are_all_there_are() -> None:
    epsilon = [{"epsilon": "2", "utility": "0.7"}, {"epsilon": "4", "utility": "0.9"}]
    assert points_of(read({"epsilon": epsilon})) == [
        ("8", 3, "1"),
        ("4", 3, "0.9"),
        ("2", 3, "0.7"),
    ]


def test_both_axes_multiply_and_names_are_taken_from_the_first() -> None:
    spec = read(
        {
            "epsilon": [{"epsilon": "2", "utility": "0.5"}, {"epsilon": "3", "utility": "0.8"}],
            "blocks": [{"count": 1, "utility": "0.6"}],
        }
    )
    points = points_of(spec)
    assert len(points) == 9
    assert ("3", 1, "0.48") in points
    # Between one block and three lies one, whichever of the two steps it comes from.
    assert {count for _, count, _ in points} == {1, 2, 3}
    utilities = [Decimal(utility) for _, _, utility in points]
    assert utilities == sorted(utilities, reverse=True)
    assert next(at.blocks.names for at, _ in spec.points() if at.blocks.most == 2) == ["a", "b"]


def test_blocks_of_a_selector() -> None:
    blocks = {"names": ABSENT, "selector": {"matchLabels": {"kind": "x"}}, "count": 2}
    spec = read({"blocks": [{"count": 1, "utility": "0.6"}]}, blocks=blocks)
    assert points_of(spec) == [("8", 2, "1"), ("8", 1, "0.6")]


def test_the_example_means_eight_points() -> None:
    spec = parse(DPMoEJobSpec, yaml.safe_load(EXAMPLE.read_text())["spec"])
    points = points_of(spec)
    assert {epsilon for epsilon, _, _ in points} == {"3", "5", "7", "9"}
    assert points[0] == ("9", 2, "1")
    assert points[-1] == ("3", 1, "0.42")
    assert len(points) == 8


POINT = {"epsilon": "2", "utility": "0.4"}

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "nothing": ({}, {}, "spec.elastic: "),
    "utility of the whole": (
        {"epsilon": [{"epsilon": "2", "utility": "1"}]},
        {},
        "spec.elastic.epsilon.utility",
    ),
    "no utility": (
        {"epsilon": [{"epsilon": "2", "utility": "0.0"}]},
        {},
        "spec.elastic.epsilon.utility",
    ),
    "falling utility": (
        {"epsilon": [POINT, {"epsilon": "3", "utility": "0.3"}]},
        {},
        "spec.elastic.epsilon.utility",
    ),
    "falling epsilon": (
        {"epsilon": [POINT, {"epsilon": "1", "utility": "0.5"}]},
        {},
        "spec.elastic.epsilon.epsilon",
    ),
    "epsilon of the whole": (
        {"epsilon": [{"epsilon": "8", "utility": "0.4"}]},
        {},
        "below privacy.epsilon 8",
    ),
    "no epsilon": ({"epsilon": [{"epsilon": "0", "utility": "0.4"}]}, {}, "greater than 0"),
    "sigma stated": (
        {"epsilon": [POINT]},
        {"privacy": {"epsilon": "8", "noiseMultiplier": "2"}},
        "no spec.privacy.noiseMultiplier",
    ),
    "no epsilon of the job": (
        {"epsilon": [POINT]},
        {"privacy": {"epsilon": ABSENT, "noiseMultiplier": "2"}},
        "needs spec.privacy.epsilon",
    ),
    "all blocks": (
        {"blocks": [{"count": 3, "utility": "0.4"}]},
        {},
        "below the 3 of spec.blocks",
    ),
    "no number of blocks": (
        {"blocks": [{"count": 1, "utility": "0.4"}]},
        {"blocks": {"names": ABSENT, "selector": {"matchLabels": {"kind": "x"}}}},
        "spec.blocks.count",
    ),
}


@pytest.mark.parametrize(("elastic", "overrides", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(elastic: dict[str, Any], overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as refused:
        read(elastic, **overrides)
    assert words in str(refused.value)


def test_blocks_are_picked_only_among_more() -> None:
    with pytest.raises(SpecError, match=r"spec\.blocks\.pick"):
        parse(DPMoEJobSpec, job_spec(blocks={"pick": "latest"}))
