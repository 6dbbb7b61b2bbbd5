"""What the trainer refuses: with which exit code, naming what, and before touching what."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import sentences, write_rows
from tests.trainer.runs import PlanMaker, Trainer

import dpmoe_trainer.train
from dpmoe_trainer.__main__ import main
from dpmoe_trainer.contract import ExitCode, Outcome


def forbid(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
    def called(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(module, name, called)


FROM_THE_PLAN: dict[str, tuple[dict[str, Any], ExitCode, list[str]]] = {
    "cost above epsilon": (
        {"privacy__epsilon": 1.0},
        ExitCode.ACCOUNTING_MISMATCH,
        ["epsilon is 1", "raise the noise"],
    ),
    "more steps than paid": (
        {"privacy__steps": 200},
        ExitCode.ACCOUNTING_MISMATCH,
        ["200 steps", "take fewer steps"],
    ),
    "several workers": (
        {"parallel": {"workers": 4, "expertParallel": 2}},
        ExitCode.BAD_PLAN,
        ["parallel.workers", "4 ranks (4 workers × 1 processes)", "set workers to 1"],
    ),
    "momentum without meaning": (
        {"training__optimizer": {"name": "adamw", "learningRate": 0.1, "momentum": 0.9}},
        ExitCode.BAD_PLAN,
        ["training.optimizer.momentum: 0.9", "sgd"],
    ),
}


@pytest.mark.parametrize("case", FROM_THE_PLAN)
def test_refused_from_the_plan_alone(
    case: str, trainer: Trainer, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, code, words = FROM_THE_PLAN[case]
    forbid(monkeypatch, dpmoe_trainer.train, "load")
    forbid(monkeypatch, dpmoe_trainer.train, "load_units")
    run = trainer.run(make_plan(**changes))
    expect_refusal(run.code, run.report, code, words)


def expect_refusal(code: int, report: Any, expected: ExitCode, words: list[str]) -> None:
    assert report is not None
    assert (code, report.outcome) == (expected, Outcome.REFUSED), report.message
    assert report.mechanism.steps == 0
    assert report.epsilon == 0
    for word in words:
        assert word in report.message


INVALID: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown method": ({"training__method": "sgd"}, ["training.method", "'sgd'", "dp-sgd"]),
    "negative noise": ({"privacy__noiseMultiplier": -1}, ["privacy.noiseMultiplier", "-1"]),
    "no source": ({"model__path": None}, ["model", "exactly one of path and huggingFace"]),
    "unknown field": ({"privacy__noise": 3}, ["privacy.noise", "3"]),
    "float16": (
        {"training__precision": "float16"},
        ["training.precision", "'float16'", "'float32' or 'bfloat16'"],
    ),
    "zero labels": ({"model__labels": 0}, ["model.labels", "0"]),
}


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_plan_names_its_fields(
    case: str, trainer: Trainer, make_plan: PlanMaker
) -> None:
    changes, words = INVALID[case]
    run = trainer.run(make_plan(**changes))
    assert run.code == ExitCode.BAD_PLAN
    assert run.report is None, "no plan, no report"
    for word in [*words, "correct"]:
        assert word in run.stderr


def test_a_plan_that_is_no_json_and_one_that_is_not_there(
    trainer: Trainer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert trainer.run("{").code == ExitCode.BAD_PLAN
    missing = str(tmp_path / "nowhere.json")
    assert main(["--plan", missing, "--output", str(tmp_path)]) == ExitCode.BAD_PLAN
    assert f"{missing} cannot be read (No such file or directory)" in capfd.readouterr().err


def test_an_invalid_plan_in_a_pod_is_told_in_the_termination_message(
    trainer: Trainer, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = trainer.folder / "termination-log"
    monkeypatch.setenv("DPMOE_PLAN", str(trainer.write(make_plan(privacy__delta="x" * 9000))))
    monkeypatch.setenv("DPMOE_TERMINATION_LOG", str(log))
    assert main([]) == ExitCode.BAD_PLAN
    assert "privacy.delta" in log.read_text()
    assert log.stat().st_size <= 4096


def beneath_a_file(folder: Path) -> dict[str, Any]:
    (folder / "file").write_text("")
    return {"path": str(folder / "file" / "model")}


def with_a_model(folder: Path) -> dict[str, Any]:
    (folder / "taken").mkdir()
    (folder / "taken" / "config.json").write_text("{}")
    return {"path": str(folder / "taken")}


OUTPUTS: dict[str, tuple[Callable[[Path], dict[str, Any]], list[str]]] = {
    "unwritable": (beneath_a_file, ["output.path", "cannot be written", "Not a directory"]),
    "taken": (with_a_model, ["output.path", "already holds a model"]),
    "climbing": (lambda folder: {"path": f"{folder}/a/../b"}, ["output.path", "without it"]),
    "no driver": (lambda _: {"uri": "s3://bucket/model"}, ["output.uri", "'s3'", "s3fs"]),
    "unknown scheme": (lambda _: {"uri": "nosuch://bucket/m"}, ["output.uri", "'nosuch'"]),
    "not a uri": (lambda _: {"uri": "/models/mine"}, ["output.uri", "scheme://"]),
    "a folder as uri": (lambda _: {"uri": "file:///models"}, ["output.uri", "output.path"]),
    "a chained uri": (lambda _: {"uri": "zip://a::memory://b"}, ["output.uri", "scheme://"]),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_an_output_that_could_not_keep_the_model(
    case: str, trainer: Trainer, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, words = OUTPUTS[case]
    forbid(monkeypatch, dpmoe_trainer.train, "load")
    plan = make_plan(output=output(trainer.folder))
    monkeypatch.setenv("DPMOE_PLAN", str(trainer.write(plan)))
    monkeypatch.setenv("DPMOE_TERMINATION_LOG", str(trainer.output / "report.json"))
    code = main([])
    expect_refusal(code, trainer.report(), ExitCode.BAD_PLAN, words)


def test_a_volume_too_small_for_the_model(
    trainer: Trainer, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, dpmoe_trainer.train, "load_units")
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr("dpmoe_trainer.output.shutil.disk_usage", lambda _: usage)
    run = trainer.run(make_plan())
    expect_refusal(run.code, run.report, ExitCode.BAD_PLAN, ["--output", "1 MiB free", "needs"])


MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "missing": ({"model__path": "/no/such/model"}, ["/no/such/model", "not a folder"]),
    "no such parameter": ({"model__trainable": ["adapter.*"]}, ["'adapter.*'", "no parameter"]),
    "too short": ({"training__maxTokens": 64}, ["32 tokens at most", "training.maxTokens is 64"]),
    "not a dense BERT": (
        {"model__upcycle": {"experts": 4, "topK": 2, "layers": [1]}},
        ["dense BERT", "mixtral"],
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_trained(
    case: str, trainer: Trainer, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, words = MODELS[case]
    forbid(monkeypatch, dpmoe_trainer.train, "load_units")
    run = trainer.run(make_plan(**changes))
    expect_refusal(run.code, run.report, ExitCode.BAD_MODEL, ["model", *words])


@pytest.mark.parametrize("content", ['{"text": "zebrafish', '{"text": "zebrafish", "label": 7}'])
def test_bad_data_is_refused_without_a_word_of_it(
    content: str, trainer: Trainer, make_plan: PlanMaker
) -> None:
    plan = make_plan()
    with (trainer.folder / "private.jsonl").open("a") as table:
        table.write(content)
    run = trainer.run(plan)
    expect_refusal(run.code, run.report, ExitCode.BAD_DATA, ["blocks[0].data"])
    assert run.report is not None
    assert "zebrafish" not in run.report.to_json() + run.stderr + run.stdout


def test_a_table_that_is_not_there(trainer: Trainer, make_plan: PlanMaker) -> None:
    run = trainer.run(make_plan(blocks__0__data__path="/no/such/table"))
    words = ["blocks[0].data.path: '/no/such/table'", "check the path"]
    expect_refusal(run.code, run.report, ExitCode.BAD_DATA, words)


def test_a_bad_evaluation_set_is_refused_before_privacy_is_spent(
    trainer: Trainer, make_plan: PlanMaker
) -> None:
    run = trainer.run(make_plan(evaluation__data__labelColumn="stars"))
    expect_refusal(
        run.code, run.report, ExitCode.BAD_DATA, ["evaluation.data", "no column 'stars'"]
    )


def test_users_need_a_column_that_names_them(trainer: Trainer, make_plan: PlanMaker) -> None:
    run = trainer.run(make_plan(blocks__0__unit={"kind": "user"}))
    expect_refusal(run.code, run.report, ExitCode.BAD_PLAN, ["blocks[0].unit.column", "name the"])
    rows = sentences(6)
    rows[2]["user"] = None
    write_rows(trainer.folder / "private.jsonl", rows)
    run = trainer.run(make_plan(blocks__0__unit={"kind": "user", "column": "user"}))
    expect_refusal(run.code, run.report, ExitCode.BAD_DATA, ["column 'user' names no user"])


def test_a_taken_port_and_one_that_is_none(
    trainer: Trainer, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("DPMOE_PROGRESS_PORT", port)
        run = trainer.run(make_plan())
    words = [f"DPMOE_PROGRESS_PORT: port {port}", "Address already in use", "choose a free one"]
    expect_refusal(run.code, run.report, ExitCode.BAD_PLAN, words)
    monkeypatch.setenv("DPMOE_PROGRESS_PORT", "http")
    run = trainer.run(make_plan())
    expect_refusal(run.code, run.report, ExitCode.BAD_PLAN, ["'http' is not a port", "65535"])


def test_a_command_line_without_a_plan_or_a_place_for_the_report(
    trainer: Trainer, make_plan: PlanMaker, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == ExitCode.BAD_PLAN
    assert "pass --plan FILE, or set DPMOE_PLAN" in capfd.readouterr().err
    assert main(["--plan", str(trainer.write(make_plan()))]) == ExitCode.BAD_PLAN
    assert "pass --output DIR, or set DPMOE_TERMINATION_LOG" in capfd.readouterr().err
    assert main(["--steps", "3"]) == ExitCode.BAD_PLAN
    assert "--steps" in capfd.readouterr().err
