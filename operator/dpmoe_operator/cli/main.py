"""The commands of `dpmoe`, one module each behind it."""

import typer

from dpmoe_operator.cli import crds, demo, ledger, operator, simulate

app = typer.Typer(
    name="dpmoe",
    help="Privacy budget as a schedulable, non-replenishable resource on Kubernetes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("operator")(operator.operator)
app.command("crds")(crds.crds)
app.command("demo")(demo.demo)
app.command("simulate")(simulate.simulate)
app.add_typer(ledger.app, name="ledger")

if __name__ == "__main__":
    app()
