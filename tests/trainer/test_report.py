"""Reports that always fit a termination message, and error descriptions that hold no data."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.trainer.runs import PlanMaker, plan_of

from dpmoe_trainer.contract import Evaluation, Outcome, TrainingReport
from dpmoe_trainer.data.tables import read_table
from dpmoe_trainer.report import build_report, describe, encode_report


@settings(max_examples=60, deadline=None)
@given(
    message=st.text(max_size=1024, alphabet=st.characters(exclude_categories=["Cs"])),
    output=st.text(min_size=1, max_size=1024, alphabet="aé漢🦓\u0001"),
    name=st.text(min_size=1, max_size=253, alphabet="a-z"),
)
def test_every_report_fits_and_can_be_read(message: str, output: str, name: str) -> None:
    report = TrainingReport.model_validate(
        {
            "job": {"namespace": name, "name": name, "uid": name},
            "plan_digest": "0" * 64,
            "outcome": "Failed",
            "mechanism": {
                "noise_multiplier": 1.0,
                "sampling_rate": 0.1,
                "clipping_norm": 1.0,
                "steps": 3,
            },
            "epsilon": 1.5,
            "output": output,
            "message": message,
        }
    )
    encoded = encode_report(report)
    assert len(encoded) <= 4096
    read = TrainingReport.model_validate_json(encoded)
    assert (read.job, read.mechanism, read.outcome) == (
        report.job,
        report.mechanism,
        report.outcome,
    )
    if len(report.to_json().encode()) <= 4096:
        assert read == report
    else:
        assert read.message == "" or message.startswith(read.message.removesuffix("…"))


def test_a_long_message_keeps_its_beginning_and_the_output(make_plan: PlanMaker) -> None:
    plan = plan_of(make_plan())
    report = build_report(plan, Outcome.FAILED, 2, 1.0, output="/out", message="漢" * 5000)
    assert len(report.message) == 1024
    report = report.model_copy(update={"message": "\u0001漢" * 512})
    read = TrainingReport.model_validate_json(encode_report(report))
    assert read.output == "/out"
    assert len(encode_report(report)) > 3500
    assert read.message.startswith("\u0001漢\u0001漢")
    assert read.message.endswith("…")


def test_a_report_says_what_ran(make_plan: PlanMaker) -> None:
    plan = plan_of(make_plan())
    scores = Evaluation(examples=10, accuracy=0.7, majority_share=0.5)
    report = build_report(plan, Outcome.COMPLETED, 3, 1.25, scores, "/out")
    content = json.loads(encode_report(report))
    assert content["mechanism"] == {
        "clippingNorm": 1.0,
        "noiseMultiplier": 1.0,
        "samplingRate": 0.5,
        "steps": 3,
    }
    assert content["job"] == {"name": "tiny", "namespace": "team", "uid": "u-1"}
    assert content["evaluation"] == {"accuracy": 0.7, "examples": 10, "majorityShare": 0.5}
    assert content["planDigest"] == plan.digest()


def test_a_foreign_error_is_named_but_not_quoted() -> None:
    with pytest.raises(AttributeError) as caught:
        read_table("zebrafish", "data", 2)  # type: ignore[arg-type]
    assert describe(caught.value).startswith("AttributeError at data/tables.py:")
    assert describe(ValueError("zebrafish")) == "ValueError"
