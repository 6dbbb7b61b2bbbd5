"""Whole runs of the trainer on a tiny mixture of experts."""

from dpmoe_trainer.contract import ExitCode, Outcome


def test_first(trainer, make_plan):
    run = trainer.run(make_plan())
    print(run)
    assert run.code == ExitCode.COMPLETED
    assert run.report.outcome is Outcome.COMPLETED


def test_spawn(trainer, make_plan):
    run = trainer.spawn(make_plan())
    print(run)
    assert run.code == ExitCode.COMPLETED
