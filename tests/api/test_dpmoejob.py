"""DPMoEJob: what a team may ask for, and in which words the rest is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.builders import ABSENT, job_spec

from dpmoe_operator.api.base import SpecError, parse
from dpmoe_operator.api.dpmoejob import DPMoEJobSpec


def read(**overrides: Any) -> DPMoEJobSpec:
    return parse(DPMoEJobSpec, job_spec(**overrides))


SELECTOR = {"names": ABSENT, "selector": {"matchLabels": {"kind": "reviews"}}}
MODEL_PATH = {"claim": ABSENT, "path": "/models/tiny"}

ACCEPTED: dict[str, dict[str, Any]] = {
    "names": {"blocks": {"names": ["a", "b"]}},
    "a selector": {"blocks": SELECTOR},
    "a selector and a count": {"blocks": {**SELECTOR, "count": 3}},
    "names and their number": {"blocks": {"names": ["a", "b"], "count": 2}},
    "sigma instead of epsilon": {"privacy": {"epsilon": ABSENT, "noiseMultiplier": "1.5"}},
    "both": {"privacy": {"noiseMultiplier": "1.5"}},
    "epochs instead of steps": {"training": {"steps": ABSENT, "epochs": 3}},
    "a model of the image": {"model": MODEL_PATH},
    "a hub model": {"model": {"claim": ABSENT, "huggingFace": {"id": "org/model"}}},
    "upcycling": {"model": {"upcycle": {"experts": 4, "layers": [0, 2]}}},
    "products in half precision": {"training": {"precision": "bfloat16"}},
    "a URI": {"output": {"claim": ABSENT, "uri": "s3://bucket/team-a/run"}},
    "placement": {
        "placement": {
            "nodeSelector": {"example.com/zone": "a"},
            "tolerations": [
                {"operator": "Exists"},
                {"key": "gpu", "value": "yes", "effect": "NoExecute", "tolerationSeconds": 5},
            ],
            "requiredNodes": [{"key": "zone", "operator": "In", "values": ["a", "b"]}],
            "preferredNodes": [{"key": "fast", "operator": "Exists"}],
        }
    },
    "resources": {"resources": {"cpu": "500m", "memory": "1.5Gi", "ephemeralStorage": "10G"}},
}


@pytest.mark.parametrize("overrides", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_accepts(overrides: dict[str, Any]) -> None:
    read(**overrides)


def node(**requirement: Any) -> dict[str, Any]:
    return {"placement": {"requiredNodes": [{"key": "zone", **requirement}]}}


def toleration(**fields: Any) -> dict[str, Any]:
    return {"placement": {"tolerations": [fields]}}


# What is wrong, then the field, the value and the remedy that the message must name.
REFUSED: list[tuple[dict[str, Any], str, str, str]] = [
    ({"blocks": {"names": ABSENT}}, "spec.blocks", "nothing", "exactly one of names, selector"),
    (
        {"blocks": {**SELECTOR, "names": ["a"]}},
        "spec.blocks",
        "names, selector",
        "exactly one of",
    ),
    ({"blocks": {"names": []}}, "spec.blocks.names", "[]", "at least 1"),
    ({"blocks": {"names": ["a", "a"]}}, "spec.blocks.names", "'a'", "must not repeat"),
    ({"blocks": {"count": 3}}, "spec.blocks.count", "3", "absent where names are given"),
    ({"blocks": {"namespace": "A"}}, "spec.blocks.namespace", "A", "pattern"),
    (
        {"blocks": {"names": ABSENT, "selector": {"matchLabels": {}}}},
        "spec.blocks.selector.matchLabels",
        "{}",
        "at least 1",
    ),
    (
        {"blocks": {"names": ABSENT, "selector": {"matchLabels": {"a b": "c"}}}},
        "spec.blocks.selector.matchLabels.a b.[key]",
        "a b",
        "pattern",
    ),
    ({"privacy": {"epsilon": ABSENT}}, "spec.privacy.epsilon", "absent", "or noiseMultiplier"),
    ({"privacy": {"epsilon": "0"}}, "spec.privacy.epsilon", "'0'", "greater than 0"),
    ({"privacy": {"epsilon": 1.5}}, "spec.privacy.epsilon", "1.5", "valid string"),
    (
        {"privacy": {"noiseMultiplier": "0.0"}},
        "spec.privacy.noiseMultiplier",
        "'0.0'",
        "greater than 0",
    ),
    ({"privacy": {"noiseMultiplier": "inf"}}, "spec.privacy.noiseMultiplier", "inf", "pattern"),
    ({"privacy": {"delta": ABSENT}}, "spec.privacy.delta", "absent", "required"),
    ({"privacy": {"delta": "0.00"}}, "spec.privacy.delta", "'0.00'", "greater than 0"),
    ({"privacy": {"clippingNorm": "0"}}, "spec.privacy.clippingNorm", "'0'", "greater than 0"),
    (
        {"model": {"path": "/models/tiny"}},
        "spec.model",
        "path, claim",
        "exactly one of path, claim, huggingFace",
    ),
    ({"model": {"claim": ABSENT}}, "spec.model", "nothing", "exactly one of"),
    (
        {"model": {**MODEL_PATH, "path": "/models/../data"}},
        "spec.model.path",
        "/models/../data",
        "'..'",
    ),
    ({"model": {"claim": {"path": "../x"}}}, "spec.model.claim.path", "../x", "'..'"),
    (
        {"model": {"claim": ABSENT, "huggingFace": {"id": "a/b", "revision": ""}}},
        "spec.model.huggingFace.revision",
        "",
        "at least 1",
    ),
    (
        {"model": {"trainable": ["*"], "lora": {"rank": 4}}},
        "spec.model.trainable",
        "'*'",
        "absent where lora is set",
    ),
    ({"model": {"lora": {"rank": 4, "on": []}}}, "spec.model.lora.on", "[]", "at least 1"),
    ({"model": {"lora": {"rank": 4, "alpha": "0"}}}, "spec.model.lora.alpha", "'0'", "than 0"),
    (
        {"model": {"upcycle": {"experts": 2, "topK": 3, "layers": [1]}}},
        "spec.model.upcycle.topK",
        "3",
        "at most 2",
    ),
    (
        {"model": {"upcycle": {"experts": 2, "layers": [1, 1]}}},
        "spec.model.upcycle.layers",
        "1",
        "must not repeat",
    ),
    ({"training": {"epochs": 1}}, "spec.training", "epochs, steps", "exactly one of"),
    ({"training": {"steps": ABSENT}}, "spec.training", "nothing", "exactly one of epochs"),
    ({"training": {"steps": 0}}, "spec.training.steps", "0", "greater than or equal to 1"),
    ({"training": {"logicalBatch": 0}}, "spec.training.logicalBatch", "0", "or equal to 1"),
    ({"training": {"method": "sgd"}}, "spec.training.method", "sgd", "'dp-sgd'"),
    (
        {"training": {"optimizer": {"learningRate": "0"}}},
        "spec.training.optimizer.learningRate",
        "'0'",
        "greater than 0",
    ),
    (
        {"training": {"optimizer": {"momentum": "1"}}},
        "spec.training.optimizer.momentum",
        "'1'",
        "below 1",
    ),
    (
        {"training": {"optimizer": {"name": "adam"}}},
        "spec.training.optimizer.name",
        "adam",
        "'adambc'",
    ),
    (
        {"privacy": {"clipping": {"groups": [{"parameters": ["*"]}]}}},
        "spec.privacy.clipping.groups",
        "1 groups",
        "absent unless mode is per-group",
    ),
    (
        {"privacy": {"clipping": {"mode": "per-group", "gamma": "0.1"}}},
        "spec.privacy.clipping.gamma",
        "'0.1'",
        "absent unless mode is automatic",
    ),
    (
        {"privacy": {"clipping": {"mode": "automatic", "gamma": "0"}}},
        "spec.privacy.clipping.gamma",
        "'0'",
        "greater than 0",
    ),
    (
        {
            "privacy": {
                "clipping": {
                    "mode": "per-group",
                    "groups": [{"parameters": ["*"], "weight": "0.0"}],
                }
            }
        },
        "spec.privacy.clipping.groups.weight",
        "'0.0'",
        "greater than 0",
    ),
    (
        {"training": {"precision": "float16"}},
        "spec.training.precision",
        "'float16'",
        "'float32' or 'bfloat16'",
    ),
    (
        {"training": {"balancing": {"strength": "0.1"}}},
        "spec.training.balancing.strength",
        "'0.1'",
        "absent for method none",
    ),
    (
        {"training": {"balancing": {"method": "sequence", "through": "loss"}}},
        "spec.training.balancing.through",
        "'loss'",
        "absent unless method is released-load",
    ),
    (
        {"training": {"balancing": {"method": "sequence", "loadShare": "0.1"}}},
        "spec.training.balancing.loadShare",
        "'0.1'",
        "absent unless method is released-load",
    ),
    (
        {"training": {"balancing": {"method": "released-load", "loadShare": "1"}}},
        "spec.training.balancing.loadShare",
        "'1'",
        "below 1",
    ),
    ({"output": {"uri": "s3://b/x"}}, "spec.output", "claim, uri", "exactly one of claim, uri"),
    ({"output": {"claim": ABSENT}}, "spec.output", "nothing", "exactly one of"),
    ({"output": {"claim": {"path": "a/../b"}}}, "spec.output.claim.path", "a/../b", "'..'"),
    (
        {"output": {"claim": ABSENT, "uri": "s3://b/team-a/../team-b"}},
        "spec.output.uri",
        "s3://b/team-a/../team-b",
        "'..'",
    ),
    (
        {"output": {"claim": ABSENT, "uri": "s3://b/%2e%2e/x"}},
        "spec.output.uri",
        "%2e%2e",
        "pattern",
    ),
    (
        {"output": {"claim": ABSENT, "uri": "/results/x"}},
        "spec.output.uri",
        "/results/x",
        "pattern",
    ),
    ({"resources": {"cpu": "a lot"}}, "spec.resources.cpu", "a lot", "pattern"),
    ({"resources": {"cpu": "-1"}}, "spec.resources.cpu", "-1", "pattern"),
    (
        toleration(key="a", operator="Exists", value="b"),
        "spec.placement.tolerations.value",
        "'b'",
        "absent for operator Exists",
    ),
    (toleration(value="b"), "spec.placement.tolerations.key", "None", "set for operator Equal"),
    (
        toleration(key="a", tolerationSeconds=3),
        "spec.placement.tolerations.effect",
        "None",
        "must be NoExecute",
    ),
    (node(operator="In"), "spec.placement.nodes.values", "[]", "1 to 64 values for operator In"),
    (
        node(operator="Exists", values=["a"]),
        "spec.placement.nodes.values",
        "['a']",
        "0 to 0 values",
    ),
    (
        node(operator="Gt", values=["1", "2"]),
        "spec.placement.nodes.values",
        "['1', '2']",
        "1 to 1 values",
    ),
    ({"image": "a b"}, "spec.image", "a b", "pattern"),
    ({"weight": 0}, "spec.weight", "0", "or equal to 1"),
    ({"priority": 2_000_000}, "spec.priority", "2000000", "less than or equal to 1000000"),
    ({"timeoutSeconds": 0}, "spec.timeoutSeconds", "0", "or equal to 1"),
]


@pytest.mark.parametrize(("overrides", "field", "value", "remedy"), REFUSED)
def test_refuses(overrides: dict[str, Any], field: str, value: str, remedy: str) -> None:
    with pytest.raises(SpecError) as refused:
        read(**overrides)
    assert refused.value.field == field
    message = str(refused.value)
    assert value in message
    assert remedy in message


EXAMPLES = Path(__file__).parents[2] / "examples" / "extra"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*-job.yaml")), ids=lambda path: path.stem)
def test_examples_are_what_they_say(path: Path) -> None:
    for manifest in yaml.safe_load_all(path.read_text()):
        assert parse(DPMoEJobSpec, manifest["spec"]).blocks.namespace == "reviews"


FORBIDDEN = ["command", "args", "env", "envFrom", "volumes", "sidecars", "podTemplate", "overrides"]


@pytest.mark.parametrize("field", FORBIDDEN)
@pytest.mark.parametrize("place", ["", "placement", "resources", "parallelism", "training"])
def test_pods_take_nothing_but_placement_and_size(place: str, field: str) -> None:
    """A command, a volume or a variable would be a way to the data around the operator."""
    fields: dict[str, Any] = {place: {field: "x"}} if place else {field: "x"}
    with pytest.raises(SpecError, match="Extra inputs are not permitted"):
        read(**fields)


def test_defaults_are_the_plain_run() -> None:
    spec = read()
    assert spec.privacy.clipping_norm == "1.0"
    assert (spec.parallelism.workers, spec.parallelism.gpus_per_worker) == (1, 0)
    assert (spec.priority, spec.weight, spec.suspend) == (0, 1, False)
    assert spec.image is None
    assert spec.timeout_seconds is None


def test_specs_survive_the_wire() -> None:
    for overrides in ACCEPTED.values():
        spec = read(**overrides)
        assert parse(DPMoEJobSpec, spec.to_object()) == spec
