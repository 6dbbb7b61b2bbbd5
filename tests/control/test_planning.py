"""Planning: what a plan pins and costs, and which blocks it takes."""

import json
import math
from typing import Any

import pytest
from tests.builders import ABSENT, IMAGE, OTHER_TEAM, OWNER, TEAM, UNITS, block, job
from tests.control.plans import plan, refusal

from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.privacy.calibration import epsilon_for
from dpmoe_operator.privacy.mechanisms import demand
from dpmoe_operator.privacy.orders import DEFAULT_ORDERS
from dpmoe_trainer.contract import LoraPlan

ADAMBC = {"name": "adambc", "learningRate": "0.001"}
ACCOUNT = "claim://vault/data/reviews.jsonl"


def test_plan_pins_the_mechanism() -> None:
    planned = plan(job(privacy={"epsilon": "2", "clippingNorm": "0.5"}))
    privacy = planned.plan.privacy
    assert privacy.sampling_rate == 100 / UNITS
    assert privacy.expected_batch == 100
    assert privacy.steps == 100
    assert privacy.clipping_norm == 0.5
    assert privacy.delta == 1e-6
    assert privacy.epsilon == 2
    spent = epsilon_for(privacy.noise_multiplier, 1e-6, 0.01, 100)
    assert 2 * 0.99 < spent <= 2


def test_demand_is_the_price_of_exactly_that_mechanism() -> None:
    planned = plan(job())
    privacy = planned.plan.privacy
    price = demand(privacy.noise_multiplier, privacy.sampling_rate, privacy.steps, DEFAULT_ORDERS)
    assert planned.demand == {ACCOUNT: price}
    assert privacy.orders == tuple(float(order) for order in DEFAULT_ORDERS)


def test_demand_is_on_the_orders_of_each_block() -> None:
    blocks = [block("a", budget={"orders": ["2", "8"]}), block("b", budget={"orders": ["8"]})]
    planned = plan(job(blocks={"names": ["a", "b"]}), *blocks)
    on_a, on_b = planned.demand.values()
    assert (len(on_a), len(on_b)) == (2, 1)
    assert on_a[1] == on_b[0]


@pytest.mark.parametrize(
    ("epochs", "batch", "steps"), [(1, 100, 100), (3, 100, 300), (1, 99, 102), (2, UNITS, 2)]
)
def test_epochs_become_steps_rounded_up(epochs: int, batch: int, steps: int) -> None:
    training = {"steps": ABSENT, "epochs": epochs, "logicalBatch": batch}
    privacy = {"epsilon": ABSENT, "noiseMultiplier": "8"}
    planned = plan(job(training=training, privacy=privacy))
    assert planned.plan.privacy.steps == steps == math.ceil(epochs * UNITS / batch)


def test_sampling_rate_is_over_all_blocks_together() -> None:
    planned = plan(job(blocks={"names": ["a", "b"]}), block("a"), block("b"))
    assert planned.plan.privacy.sampling_rate == 100 / (2 * UNITS)
    assert [b.name for b in planned.plan.blocks] == ["a", "b"]
    assert len(set(planned.demand.values())) == 1


def test_stated_noise_multiplier_is_taken_as_it_is() -> None:
    privacy = plan(job(privacy={"epsilon": ABSENT, "noiseMultiplier": "1.25"})).plan.privacy
    assert privacy.noise_multiplier == 1.25
    assert privacy.epsilon == epsilon_for(1.25, 1e-6, 0.01, 100)


def test_both_stated_hold_together_within_what_was_written_by_hand() -> None:
    exact = epsilon_for(1.25, 1e-6, 0.01, 100)
    plan(job(privacy={"epsilon": f"{exact * 1.5:.6f}", "noiseMultiplier": "1.25"}))
    plan(job(privacy={"epsilon": f"{exact * 0.9995:.6f}", "noiseMultiplier": "1.25"}))
    reason, message = refusal(
        job(privacy={"epsilon": f"{exact * 0.99:.6f}", "noiseMultiplier": "1.25"})
    )
    assert reason is Reason.INVALID_SPEC
    assert message.startswith("spec.privacy.noiseMultiplier: '1.25': contradicts epsilon")
    assert f"it costs epsilon {exact:.4g}; state one of the two" in message


def test_plan_carries_what_the_trainer_needs() -> None:
    evaluation = {
        "format": "csv",
        "textColumn": "t",
        "labelColumn": "l",
        "claim": {"claimName": "public", "path": "test.csv"},
    }
    asked = job(
        "my-run",
        uid="u",
        model={"upcycle": {"experts": 4, "layers": [0, 1]}, "trainable": ["*.experts.*"]},
        training={"physicalBatch": 8, "maxTokens": 32, "optimizer": {"name": "sgd"}},
    )
    partition = {"column": "year", "values": ["2025"]}
    reviews = block(
        dataset={"partition": partition, "labels": 5},
        evaluation=evaluation,
        unit={"kind": "user", "column": "author"},
    )
    written = plan(asked, reviews).plan
    assert (written.job.namespace, written.job.name, written.job.uid) == (TEAM, "my-run", "u")
    [data] = written.blocks
    assert data.account == f"{ACCOUNT}?year=2025"
    assert data.units == UNITS
    assert (data.unit.kind, data.unit.column) == ("user", "author")
    assert data.data.path == "/dpmoe/claims/data/reviews.jsonl"
    assert data.data.partition is not None
    assert data.data.partition.values == ("2025",)
    assert written.model.path == "/dpmoe/claims/models/tiny"
    assert written.model.labels == 5
    assert written.model.upcycle is not None
    assert (written.model.upcycle.experts, written.model.upcycle.top_k) == (4, 2)
    assert written.model.trainable == ("*.experts.*",)
    assert written.training.optimizer.learning_rate == 0.001
    assert (written.training.physical_batch, written.training.max_tokens) == (8, 32)
    assert written.evaluation is not None
    assert written.evaluation.data.path == "/dpmoe/claims/public/test.csv"
    assert written.output is not None
    assert written.output.path == f"/dpmoe/outputs/results/{TEAM}/run"


def test_a_language_model_learns_text_alone() -> None:
    evaluation = {"claim": {"claimName": "public", "path": "t.csv"}, "format": "csv"}
    labelled = evaluation | {"textColumn": "t", "labelColumn": "l"}
    asked = job(training={"task": "language-modelling"})
    written = plan(asked, block(evaluation=labelled)).plan
    assert written.model.labels is None
    assert written.blocks[0].data.label_column is None
    assert written.evaluation is not None
    assert written.evaluation.data.label_column is None
    unlabelled = block(dataset={"labelColumn": ABSENT}, evaluation=evaluation | {"textColumn": "t"})
    assert plan(asked, unlabelled).plan.evaluation is not None


def test_token_ids_are_learnt_in_place_of_text() -> None:
    written = plan(job(), block(dataset={"textColumn": ABSENT, "tokensColumn": "ids"})).plan
    assert written.blocks[0].data.text_column is None
    assert written.blocks[0].data.tokens_column == "ids"


def test_classes_need_labels() -> None:
    reason, message = refusal(job(), block(dataset={"labelColumn": ABSENT}))
    assert reason is Reason.INVALID_SPEC
    assert "spec.training.task: 'classification': must be language-modelling" in message
    unlabelled = {"claim": {"claimName": "public", "path": "t.csv"}, "format": "csv"}
    scored = block(evaluation=unlabelled | {"textColumn": "t"})
    assert plan(job(), scored).plan.evaluation is None


def test_plan_pins_adapters() -> None:
    assert plan(job()).plan.model.lora is None
    adapted = plan(job(model={"lora": {"rank": 8, "on": ["experts"]}})).plan.model
    assert adapted.lora == LoraPlan(rank=8, alpha=16.0, attention=False, experts=True)
    assert plan(job(model={"lora": {"rank": 8, "alpha": "4"}})).plan.model.lora == LoraPlan(
        rank=8, alpha=4.0
    )


def test_plan_pins_clipping_and_balancing_with_their_defaults() -> None:
    plain = plan(job(uid="u")).plan
    assert plain.privacy.clipping is None
    assert plain.training.balancing is None
    # What is not asked for is not in the plan, so that older plans keep their digests.
    assert "clipping" not in json.loads(plain.to_json())["privacy"]
    assert "balancing" not in json.loads(plain.to_json())["training"]

    groups = [{"parameters": ["*.experts.*"], "weight": "3"}, {"parameters": ["*"]}]
    recipes = [
        ({"clipping": {"mode": "flat"}}, {"balancing": {"method": "none"}}),
        ({"clipping": {"mode": "automatic"}}, {"balancing": {"method": "sequence"}}),
        ({"clipping": {"mode": "automatic", "gamma": "0.1"}}, {}),
        ({"clipping": {"mode": "per-group"}}, {"balancing": {"method": "released-load"}}),
        (
            {"clipping": {"mode": "per-group", "groups": groups}},
            {"balancing": {"method": "released-load", "through": "loss", "loadShare": "0.1"}},
        ),
        ({}, {"balancing": {"method": "sequence", "strength": "0.5"}, "optimizer": ADAMBC}),
    ]
    plans = [plan(job(uid="u", privacy=p, training=t)).plan for p, t in recipes]

    def pinned(index: int) -> tuple[Any, Any]:
        return plans[index].privacy.clipping, plans[index].training.balancing

    assert plans[0].digest() == plain.digest()
    assert len({each.digest() for each in plans}) == len(plans)
    clipping, balancing = pinned(1)
    assert (clipping.mode, clipping.gamma) == ("automatic", 0.01)
    assert (balancing.method, balancing.strength, balancing.through) == ("sequence", 0.01, None)
    assert pinned(2)[0].gamma == 0.1
    clipping, balancing = pinned(3)
    assert (clipping.mode, clipping.groups) == ("per-group", ())
    assert (balancing.through, balancing.strength, balancing.load_share) == ("bias", 0.05, 0.02)
    clipping, balancing = pinned(4)
    assert [each.weight for each in clipping.groups] == [3, 1]
    assert clipping.groups[0].parameters == ("*.experts.*",)
    assert (balancing.through, balancing.strength, balancing.load_share) == ("loss", 0.01, 0.1)
    assert pinned(5)[1].strength == 0.5
    assert plans[5].training.optimizer.name == "adambc"
    # Sensitivity is C in every mode, so none has another price.
    mechanisms = [each.privacy.model_copy(update={"clipping": None}) for each in plans]
    assert all(mechanism == plain.privacy for mechanism in mechanisms)


def test_plan_pins_a_precision_other_than_float32() -> None:
    plain, half = (
        plan(job(uid="u", training={"precision": precision})).plan
        for precision in ("float32", "bfloat16")
    )
    # As with clipping: older plans keep their digests.
    assert "precision" not in json.loads(plain.to_json())["training"]
    assert plan(job(uid="u")).plan.digest() == plain.digest()
    assert half.training.precision == "bfloat16"
    assert half.digest() != plain.digest()
    # No part of what only ranks depend on: no checkpoint goes on in another precision.
    assert half.run_digest() != plain.run_digest()
    assert half.privacy == plain.privacy


def test_other_sources_and_targets() -> None:
    hub = {"claim": ABSENT, "format": ABSENT, "huggingFace": {"id": "o/r", "revision": "v1"}}
    access = [{"namespace": TEAM, "outputs": [{"uriPrefix": "s3://bucket/a/"}]}]
    asked = job(
        model={"claim": ABSENT, "path": "/models/tiny"},
        output={"claim": ABSENT, "uri": "s3://bucket/a/run"},
    )
    written = plan(asked, block(dataset=hub, access=access)).plan
    data = written.blocks[0].data
    assert (data.path, data.hugging_face, data.revision, data.split) == (None, "o/r", "v1", "train")
    assert written.model.path == "/models/tiny"
    assert written.output is not None
    assert (written.output.path, written.output.uri) == (None, "s3://bucket/a/run")


def test_results_of_two_teams_cannot_meet() -> None:
    paths = {plan(job(namespace=namespace)).plan.output for namespace in (TEAM, OTHER_TEAM)}
    assert len(paths) == 2


def test_image_is_the_operators_unless_the_owner_trusts_another() -> None:
    assert plan(job()).image == IMAGE
    assert plan(job(image=IMAGE)).image == IMAGE
    access = [
        {
            "namespace": TEAM,
            "models": ["models"],
            "outputs": [{"claimName": "results"}],
            "images": ["registry.example/other:1"],
        }
    ]
    trusting = block(access=access)
    assert plan(job(image="registry.example/other:1"), trusting).image.endswith("other:1")


def test_caps_of_the_jobs_namespace() -> None:
    access = [
        {
            "namespace": TEAM,
            "maxEpsilon": "3",
            "models": ["models"],
            "outputs": [{"claimName": "results"}],
        }
    ]
    assert plan(job()).caps == {}
    assert plan(job(), block(access=access)).caps == {ACCOUNT: "3"}


# Which blocks


def test_selector_takes_the_first_matching_blocks_by_name() -> None:
    labelled = {"labels": {"kind": "reviews"}}
    blocks = [block(name, meta=labelled) for name in ("c", "a", "b")] + [block("other")]
    chosen = {"names": ABSENT, "selector": {"matchLabels": {"kind": "reviews"}}}
    assert [b.name for b in plan(job(blocks=chosen), *blocks).plan.blocks] == ["a", "b", "c"]
    two = plan(job(blocks={**chosen, "count": 2}), *blocks)
    assert [b.name for b in two.plan.blocks] == ["a", "b"]
    reason, message = refusal(job(blocks={**chosen, "count": 4}), *blocks)
    assert reason is Reason.BLOCK_NOT_FOUND
    assert message.startswith("spec.blocks.count: 4: only 3 PrivateBlocks in namespace vault match")


def test_selector_that_matches_more_than_a_job_may_have_needs_a_count() -> None:
    labelled = {"labels": {"kind": "reviews"}}
    blocks = [block(f"b{number:03}", meta=labelled) for number in range(257)]
    chosen = {"names": ABSENT, "selector": {"matchLabels": {"kind": "reviews"}}}
    reason, message = refusal(job(blocks=chosen), *blocks)
    assert reason is Reason.INVALID_SPEC
    assert message == (
        "spec.blocks.count: 'absent': 257 PrivateBlocks match {'kind': 'reviews'}; must be set, to"
        " at most 256"
    )
    assert len(plan(job(blocks={**chosen, "count": 256}), *blocks).plan.blocks) == 256


def test_selector_leaves_refused_and_foreign_blocks_out() -> None:
    labelled = {"labels": {"kind": "reviews"}}
    blocks = [
        block("a", meta=labelled, budget={"epsilon": "-1"}),
        block("b", "elsewhere", meta=labelled),
        block("c", meta={"labels": {"kind": "reviews", "more": "x"}}),
    ]
    chosen = {"names": ABSENT, "selector": {"matchLabels": {"kind": "reviews"}}}
    assert [b.name for b in plan(job(blocks=chosen), *blocks).plan.blocks] == ["c"]
    reason, message = refusal(
        job(blocks={"names": ABSENT, "selector": {"matchLabels": {"kind": "none"}}}), *blocks
    )
    assert reason is Reason.BLOCK_NOT_FOUND
    assert "only 0 PrivateBlocks" in message


def test_names_of_the_data_namespace_only() -> None:
    """A block of the same name elsewhere is another block."""
    both = [block(namespace="elsewhere", access=[]), block()]
    assert plan(job(), *both).plan.blocks[0].namespace == OWNER
