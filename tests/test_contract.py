"""The contract of operator and trainer: canonical, digestible, and strict about what it takes."""

import hashlib
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.builders import SETTINGS, block, job, snapshot

from dpmoe_operator.control.accounts import standings
from dpmoe_operator.control.planning import plan_job
from dpmoe_operator.control.views import JobView
from dpmoe_trainer.contract import (
    TERMINATION_MESSAGE_BYTES,
    DataPlan,
    ExitCode,
    JobReference,
    Mechanism,
    ModelPlan,
    Outcome,
    OutputPlan,
    PrivacyPlan,
    Progress,
    TrainingPlan,
    TrainingReport,
)
from dpmoe_trainer.environment import earlier_pods

JOB = JobReference(namespace="team-a", name="train", uid="u")


def a_plan(**fields: Any) -> TrainingPlan:
    """A plan as the operator writes it."""
    asked = JobView.of(job(uid="u", **fields))
    return plan_job(asked, standings(snapshot([block()])), SETTINGS).plan


def a_report(**fields: Any) -> TrainingReport:
    mechanism = Mechanism(noise_multiplier=1.5, sampling_rate=0.01, clipping_norm=1.0, steps=3)
    values: dict[str, Any] = {
        "job": JOB,
        "plan_digest": "0" * 64,
        "outcome": Outcome.STOPPED,
        "mechanism": mechanism,
        "epsilon": 0.5,
    }
    return TrainingReport(**values | fields)


def test_operators_plan_is_what_the_trainer_reads() -> None:
    written = a_plan()
    read = TrainingPlan.model_validate_json(written.to_json())
    assert read == written
    assert read.digest() == written.digest()


def test_digest_is_that_of_the_mounted_bytes() -> None:
    plan = a_plan()
    assert plan.digest() == hashlib.sha256(plan.to_json().encode()).hexdigest()


def test_json_is_canonical() -> None:
    text = a_plan().to_json()
    assert text == json.dumps(
        json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    assert "null" not in text


def changes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all leaves of a JSON value."""
    if isinstance(value, dict):
        return [p for key, child in value.items() for p in changes(child, (*path, key))]
    if isinstance(value, list):
        return [p for i, child in enumerate(value) for p in changes(child, (*path, i))]
    return [path]


PLAN = a_plan()
LEAVES = changes(json.loads(PLAN.to_json()))


@settings(derandomize=True, deadline=None)
@given(st.sampled_from(LEAVES), st.integers(1, 1000) | st.text(max_size=5) | st.floats(0.1, 0.9))
def test_digest_tells_any_two_plans_apart(path: tuple[Any, ...], value: Any) -> None:
    content = json.loads(PLAN.to_json())
    node = content
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    try:
        other = TrainingPlan.model_validate_json(json.dumps(content))
    except ValidationError:
        return
    assert (other.digest() == PLAN.digest()) == (other == PLAN)


@given(st.floats(1e-300, 1e300), st.floats(1e-300, 1), st.integers(1, 10**9))
@settings(derandomize=True, deadline=None)
def test_floats_survive_the_wire_exactly(sigma: float, rate: float, steps: int) -> None:
    """The settlement compares the mechanism of plan and report for equality."""
    mechanism = Mechanism(
        noise_multiplier=sigma, sampling_rate=rate, clipping_norm=sigma, steps=steps
    )
    assert Mechanism.model_validate_json(mechanism.to_json()) == mechanism
    assert float(repr(sigma)) == sigma


def test_models_are_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PLAN.privacy.steps = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("model", "content", "problem"),
    [
        (TrainingReport, {"surprise": 1}, "Extra inputs"),
        (DataPlan, {"textColumn": "t", "labelColumn": "l"}, "exactly one of path and huggingFace"),
        (
            DataPlan,
            {"path": "/a", "huggingFace": "a/b", "textColumn": "t", "labelColumn": "l"},
            "exactly one of",
        ),
        (DataPlan, {"path": "/a", "textColumn": "t", "labelColumn": "l"}, "format must be set"),
        (DataPlan, {"huggingFace": "a/b"}, "exactly one of textColumn and tokensColumn"),
        (
            DataPlan,
            {"huggingFace": "a/b", "textColumn": "t", "tokensColumn": "i"},
            "exactly one of textColumn and tokensColumn",
        ),
        (DataPlan, {"path": "/a", "format": "tsv", "tokensColumn": "i"}, "tsv has no lists"),
        (ModelPlan, {"labels": 2}, "exactly one of path and huggingFace"),
        (OutputPlan, {}, "exactly one of path and uri"),
        (OutputPlan, {"path": "/a", "uri": "s3://a"}, "exactly one of path and uri"),
    ],
)
def test_contradictions_are_errors(model: Any, content: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        model.model_validate(content)


PRIVACY: dict[str, Any] = {
    "epsilon": 1.0,
    "delta": 1e-6,
    "noiseMultiplier": 1.0,
    "samplingRate": 0.01,
    "steps": 10,
    "clippingNorm": 1.0,
    "expectedBatch": 100.0,
    "orders": [2.0],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("epsilon", value) for value in (0, -1, float("inf"), float("nan"))),
        *(("delta", value) for value in (0, 1, -1e-9, float("nan"))),
        *(("noiseMultiplier", value) for value in (0, -1, float("inf"))),
        *(("samplingRate", value) for value in (0, 1.1, float("nan"))),
        *(("steps", value) for value in (0, -1, 1.5)),
        *(("clippingNorm", value) for value in (0, float("inf"))),
        *(("orders", value) for value in ([], [1.0] * 65)),
    ],
)
def test_mechanisms_that_mean_nothing_are_errors(field: str, value: Any) -> None:
    PrivacyPlan.model_validate(PRIVACY)
    with pytest.raises(ValidationError):
        PrivacyPlan.model_validate(PRIVACY | {field: value})


def test_newer_plans_and_reports_are_not_understood() -> None:
    for model, value in ((TrainingPlan, PLAN), (TrainingReport, a_report())):
        content = json.loads(value.to_json()) | {"version": 2}
        with pytest.raises(ValidationError, match="version"):
            model.model_validate(content)


def test_largest_report_of_ordinary_names_fits_a_termination_message() -> None:
    report = a_report(
        job=JobReference(namespace="n" * 63, name="j" * 63, uid="u" * 36),
        message="m" * 1024,
        output="/dpmoe/outputs/" + "p" * 900,
    )
    assert len(report.to_json().encode()) <= TERMINATION_MESSAGE_BYTES


def test_reports_say_nothing_that_a_plan_did_not_allow() -> None:
    """Every field of a report, so that a new one is a decision: no loss, no sample, no key."""
    assert set(TrainingReport.model_fields) == {
        *("version", "job", "plan_digest", "outcome", "mechanism", "epsilon", "evaluation"),
        *("output", "attempts", "message"),
    }
    assert set(Progress.model_fields) == {
        *("step", "steps", "epsilon", "steps_per_second", "phase")
    }


def test_exit_codes_are_fixed() -> None:
    """Operators of another version read them."""
    assert {code.name: code.value for code in ExitCode} == {
        "COMPLETED": 0,
        "CRASHED": 1,
        "BAD_PLAN": 3,
        "ACCOUNTING_MISMATCH": 4,
        "BUDGET_EXHAUSTED": 5,
        "BAD_DATA": 6,
        "BAD_MODEL": 7,
        "JOURNAL_LOST": 8,
        "BAD_CHECKPOINT": 9,
        "PEER_LOST": 10,
        "HUNG": 11,
        "STOPPED": 143,
    }


def test_contract_needs_no_heavy_library() -> None:
    """The operator's image has no torch."""
    heavy = ["torch", "transformers", "datasets", "numpy", "opacus"]
    code = f"import sys, dpmoe_trainer.contract as c; assert not set({heavy}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"DPMOE_FAILURES": "0", "DPMOE_DISRUPTIONS": ""}, False),
        ({"DPMOE_FAILURES": "1", "DPMOE_DISRUPTIONS": ""}, True),
        ({"DPMOE_FAILURES": "0", "DPMOE_DISRUPTIONS": "2"}, True),
        ({"DPMOE_FAILURES": "0", "DPMOE_RESUMED": "true"}, True),
    ],
)
def test_pod_knows_whether_there_may_have_been_another(
    environment: dict[str, str], expected: bool
) -> None:
    assert (earlier_pods(environment) > 0) is expected
