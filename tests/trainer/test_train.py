"""Whole runs of the trainer on a tiny mixture of experts: what they leave, and how they end."""

import json
import os
import resource
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import sentences, write_rows
from tests.trainer.processes import free_port
from tests.trainer.runs import PlanMaker, Trainer, plan_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from dpmoe_trainer.__main__ import main
from dpmoe_trainer.contract import ExitCode, Outcome, Progress, TrainingReport
from dpmoe_trainer.dp.accounting import spent
from dpmoe_trainer.dp.noise import NoiseKey, add_noise

SECRET = "zebrafish"
"""A word of private rows that must not come out anywhere."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForSequenceClassification.from_pretrained(
        folder
    ).state_dict()
    return state


def test_a_run_leaves_a_model_that_transformers_loads_and_a_report_that_proves_it(
    trainer: Trainer, make_plan: PlanMaker, tiny_mixtral: Path
) -> None:
    plan = make_plan()
    run = trainer.run(plan)

    assert run.code == ExitCode.COMPLETED
    report, mechanism = run.report, plan["privacy"]
    assert report is not None
    assert report.outcome is Outcome.COMPLETED
    assert report.plan_digest == plan_of(plan).digest()
    assert report.mechanism.steps == 3
    assert report.mechanism.noise_multiplier == mechanism["noiseMultiplier"]
    assert report.epsilon == pytest.approx(
        spent(1.0, 0.5, 3, mechanism["delta"], mechanism["orders"])
    )
    assert report.output == str(trainer.output)
    assert report.evaluation is not None
    assert report.evaluation.examples == 9
    assert report.evaluation.majority_share == pytest.approx(5 / 9)

    before, after = weights(tiny_mixtral), weights(trainer.output)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    tokenizer = AutoTokenizer.from_pretrained(trainer.output)
    assert tokenizer("good film")["input_ids"] == [3, 5]
    assert {path.name for path in trainer.output.iterdir()} >= {"config.json", "report.json"}
    assert not list(trainer.output.glob(".partial-*"))


def test_token_ids_train_what_their_text_would(
    trainer: Trainer, make_plan: PlanMaker, tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpmoe_trainer.resume.NoiseKey", lambda secret=bytes(32): NoiseKey(secret))
    tokenizer = AutoTokenizer.from_pretrained(tiny_mixtral)
    plan = make_plan(training__maxTokens=5)
    assert trainer.run(plan).code == ExitCode.COMPLETED
    by_text = weights(trainer.output)

    for data in (plan["blocks"][0]["data"], plan["evaluation"]["data"]):
        path = Path(data["path"])
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["ids"] = tokenizer(row.pop("text"))["input_ids"]
        write_rows(path, rows)
        del data["textColumn"]
        data["tokensColumn"] = "ids"
    shutil.rmtree(trainer.output)
    run = trainer.run(plan)
    assert run.code == ExitCode.COMPLETED, run.stderr
    by_ids = weights(trainer.output)
    for name, value in by_text.items():
        torch.testing.assert_close(by_ids[name], value, atol=1e-4, rtol=1e-3)


def test_token_ids_of_another_vocabulary_are_refused(
    trainer: Trainer, make_plan: PlanMaker
) -> None:
    rows = [{"ids": [3, 4, 5, 987654], "label": 0}]
    path = write_rows(trainer.folder / "ids.jsonl", rows)
    data = {"path": str(path), "format": "jsonl", "tokensColumn": "ids", "labelColumn": "label"}
    run = trainer.run(make_plan(blocks__0__data=data))
    assert run.code == ExitCode.BAD_DATA
    assert "blocks[0].data.tokensColumn" in run.stderr
    assert "987654" not in run.stderr
    assert run.report is not None
    assert run.report.mechanism.steps == 0


def test_frozen_parameters_stay_what_they_were(
    trainer: Trainer, make_plan: PlanMaker, tiny_mixtral: Path
) -> None:
    run = trainer.run(make_plan(model__trainable=["model.layers.1.mlp.*", "score.*"]))
    assert run.code == ExitCode.COMPLETED
    before, after = weights(tiny_mixtral), weights(trainer.output)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(("model.layers.1.mlp", "score"))}


def test_upcycled_model_with_a_frozen_lower_part(
    trainer: Trainer, make_plan: PlanMaker, tiny_bert: Path
) -> None:
    plan = make_plan(
        model__path=str(tiny_bert),
        model__upcycle={"experts": 4, "topK": 2, "layers": [1]},
        model__trainable=["layers.1.experts.*", "classifier.*"],
        training__optimizer={"name": "adamw", "learningRate": 0.01, "warmupSteps": 1},
    )
    assert trainer.run(plan).code == ExitCode.COMPLETED
    model = AutoModelForSequenceClassification.from_pretrained(trainer.output)
    assert model.config.num_experts == 4


def test_the_mechanism_is_the_plans(
    trainer: Trainer, make_plan: PlanMaker, tiny_mixtral: Path
) -> None:
    """With all units in every step and hardly any noise, the run is SGD on clipped gradients."""
    plan = make_plan(
        blocks__0__data__path=str(write_rows(trainer.folder / "few.jsonl", sentences(6))),
        privacy__samplingRate=1.0,
        privacy__noiseMultiplier=1e-6,
        privacy__epsilon=1e15,
        privacy__expectedBatch=5.0,
        privacy__steps=3,
        training__optimizer={"name": "sgd", "learningRate": 0.5, "momentum": 0.5},
    )
    assert trainer.run(plan).code == ExitCode.COMPLETED

    model = AutoModelForSequenceClassification.from_pretrained(tiny_mixtral)
    tokenizer = AutoTokenizer.from_pretrained(tiny_mixtral)
    parameters = list(model.parameters())
    velocity = [torch.zeros_like(parameter) for parameter in parameters]
    for step in range(3):
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for row in sentences(6):
            ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
            loss = model(input_ids=ids, labels=torch.tensor([row["label"]])).loss
            gradients = torch.autograd.grad(loss, parameters)
            norm = torch.stack([gradient.pow(2).sum() for gradient in gradients]).sum().sqrt()
            for sum_, gradient in zip(total, gradients, strict=True):
                sum_ += gradient * (1.0 / norm).clamp_max(1)
        with torch.no_grad():
            for parameter, moving, sum_ in zip(parameters, velocity, total, strict=True):
                moving.mul_(0.5).add_(sum_ / 5.0)
                parameter -= 0.5 * (3 - step) / 3 * moving
    trained = weights(trainer.output)
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(trained[name], expected, atol=2e-5, rtol=0)


def test_steps_without_any_unit_still_add_noise(
    trainer: Trainer, make_plan: PlanMaker, tiny_mixtral: Path
) -> None:
    run = trainer.run(make_plan(privacy__samplingRate=1e-12, privacy__steps=2))
    assert run.code == ExitCode.COMPLETED
    assert run.report is not None
    assert run.report.mechanism.steps == 2
    before, after = weights(tiny_mixtral), weights(trainer.output)
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_users_as_privacy_units(trainer: Trainer, make_plan: PlanMaker) -> None:
    unit = {"kind": "user", "column": "user"}
    assert trainer.run(make_plan(blocks__0__unit=unit)).code == ExitCode.COMPLETED


def test_nothing_private_leaves_the_process(trainer: Trainer, make_plan: PlanMaker) -> None:
    rows = sentences(24)
    for row in rows:
        row["text"] += f" {SECRET}"
    rows[0]["text"] += f" {SECRET}" * 600  # longer than the model takes, which tokenizers warn of
    write_rows(trainer.folder / "private.jsonl", rows)
    home, temporary = trainer.folder / "home", trainer.folder / "tmp"
    home.mkdir()
    temporary.mkdir()
    process = subprocess.run(
        trainer.command(make_plan()),
        capture_output=True,
        text=True,
        env=os.environ | {"HOME": str(home), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert process.returncode == ExitCode.COMPLETED, process.stderr
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) == 1, "only the trainer's own summary"
    for place in (trainer.output, home, temporary):
        for file in place.rglob("*"):
            assert SECRET.encode() not in (file.read_bytes() if file.is_file() else b""), file
    assert not list(temporary.iterdir())


def test_sigterm_stops_after_the_step_and_reports_what_is_spent(
    trainer: Trainer, make_plan: PlanMaker
) -> None:
    steps = 1_000_000
    port = free_port()
    process = subprocess.Popen(
        trainer.command(
            make_plan(privacy__steps=steps, privacy__epsilon=1e9, privacy__samplingRate=0.1)
        ),
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"DPMOE_PROGRESS_PORT": str(port), "OMP_NUM_THREADS": "1"},
    )
    progress = wait_for_step(process, port, 2)
    assert progress.phase == "Training"
    assert progress.steps == steps
    assert progress.epsilon > 0
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=300)

    assert process.returncode == ExitCode.STOPPED
    report = trainer.report()
    assert report is not None
    assert report.outcome is Outcome.STOPPED
    assert progress.step <= report.mechanism.steps < steps
    assert "Stopped" in stderr
    assert not (trainer.output / "config.json").exists()


def wait_for_step(process: subprocess.Popen[str], port: int, step: int) -> Progress:
    for _ in range(3000):
        assert process.poll() is None, process.stderr and process.stderr.read()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=5) as answer:
                progress = Progress.model_validate_json(answer.read())
        except OSError:
            pass
        else:
            if progress.step >= step:
                return progress
        time.sleep(0.1)
    raise AssertionError("the run never got so far")


def test_in_a_pod_the_environment_names_everything(
    trainer: Trainer, make_plan: PlanMaker, tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = trainer.folder / "pod"
    (root / "dev").mkdir(parents=True)
    (root / "data").mkdir()
    (root / "model").symlink_to(tiny_mixtral)
    write_rows(root / "data/rows.jsonl", sentences(24))
    data = make_plan()["evaluation"]["data"] | {"path": "/data/rows.jsonl"}
    plan = make_plan(
        blocks__0__data=data,
        evaluation__data=data,
        model__path="/model",
        output={"path": "/output/team/tiny"},
    )
    (root / "plan.json").write_text(json.dumps(plan))
    monkeypatch.setenv("DPMOE_ROOT", str(root))
    monkeypatch.setenv("DPMOE_PLAN", "/plan.json")
    monkeypatch.setenv("DPMOE_TERMINATION_LOG", "/dev/termination-log")

    assert main([]) == ExitCode.COMPLETED
    report = TrainingReport.model_validate_json((root / "dev/termination-log").read_bytes())
    assert report.output == "/output/team/tiny"
    assert report.plan_digest == plan_of(plan).digest()
    assert weights(root / "output/team/tiny")


def test_a_crash_reports_the_steps_but_not_the_errors_text(
    trainer: Trainer, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choke(*arguments: Any, **more: Any) -> dict[str, torch.Tensor]:
        if arguments[-1] == 1:
            raise ValueError(f"cannot digest {SECRET}")
        return add_noise(*arguments, **more)

    monkeypatch.setattr("dpmoe_trainer.train.add_noise", choke)
    run = trainer.run(make_plan())
    assert run.code == ExitCode.CRASHED
    assert run.report is not None
    assert run.report.outcome is Outcome.FAILED
    assert run.report.mechanism.steps == 2, "the sample of the second step was drawn"
    assert run.report.message.startswith("ValueError at train.py:")
    assert run.report.epsilon > 0
    assert SECRET not in run.report.to_json() + run.stderr + run.stdout


def test_a_full_disk_fails_the_run_and_still_lets_the_report_out(
    trainer: Trainer, make_plan: PlanMaker
) -> None:
    plan = make_plan()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer.write(plan)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        run = trainer.run(plan)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.code == ExitCode.CRASHED
    assert run.report is not None
    assert run.report.outcome is Outcome.FAILED
    assert run.report.mechanism.steps == 3
    assert "could not be saved" in run.report.message
    assert "make room" in run.report.message
    assert {path.name for path in trainer.output.iterdir()} == {"report.json"}


def test_a_killed_save_leaves_nothing_that_loads(
    trainer: Trainer, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = PreTrainedModel.save_pretrained

    def save_and_die(model: PreTrainedModel, folder: Path, **options: Any) -> None:
        save(model, folder, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(make_plan())
    assert not (trainer.output / "config.json").exists()
    assert not (trainer.output / "model.safetensors").exists()
