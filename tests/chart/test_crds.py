"""The chart's CustomResourceDefinitions are those of crds/, and outlive the release."""

import json
from pathlib import Path

import pytest
from tests.chart.helm import CHART, ROOT, Helm, Manifest

from dpmoe_operator.api.crd import all_definitions
from dpmoe_operator.cli.crds import render

KIND = "CustomResourceDefinition"


def definitions(manifests: list[Manifest]) -> dict[str, Manifest]:
    return {m["spec"]["names"]["plural"]: m for m in manifests if m["kind"] == KIND}


@pytest.mark.parametrize("folder", [ROOT / "crds", CHART / "files" / "crds"], ids=["crds", "chart"])
def test_generated_files_are_up_to_date(folder: Path) -> None:
    files = {path.name: path.read_text() for path in folder.iterdir()}
    assert files == render(), "run `make crds`"


def test_uninstalling_keeps_them_by_default(default: list[Manifest]) -> None:
    kept = definitions(default)
    assert len(kept) == 3
    for definition in kept.values():
        assert definition["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    # As JSON: in Python 5.0 == 5, but the API server takes no 5.0 for an integer.
    assert as_json(kept) == as_json(all_definitions())


def test_only_who_does_not_keep_them_allows_the_ledgers_deletion(helm: Helm) -> None:
    rendered = definitions(helm.render({"crds": {"keep": False}}))
    ledger = rendered["ledgerentries"]["metadata"].pop("annotations")
    assert ledger == {"dpmoe.dev/allow-deletion": "forget-all-spent-budget"}
    assert as_json(rendered) == as_json(all_definitions())


def as_json(manifests: dict[str, Manifest]) -> str:
    return json.dumps(manifests, sort_keys=True)


def test_they_can_be_installed_by_something_else(helm: Helm) -> None:
    assert not definitions(helm.render({"crds": {"install": False}}))
