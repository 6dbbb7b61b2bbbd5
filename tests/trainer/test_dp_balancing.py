"""Expert loads and balancing losses: what they are, whose they are, and what is made of them."""

import math
from contextlib import contextmanager

import pytest
import torch
from tests.trainer.families import TOLERANCE, build, crowd_of, join, make_batch, rows
from tests.trainer.oracle import difference, median_norm, size
from transformers import AutoModelForSequenceClassification

from dpmoe_trainer.dp import NotPerSample, check_model, clipped_sum
from dpmoe_trainer.dp.balancing import Balancing, ReleasedLoad, SequenceBalancing
from dpmoe_trainer.dp.noise import NoiseKey, add_noise
from dpmoe_trainer.dp.routes import BalancingLoss, LoadQuery, RoutedLayer, Routes

SEEN = [
    "dpmoe-bert",
    "mixtral-lm",
    "mixtral-lora",
    "qwen3-classifier",
    "gpt-oss-lm",
    "deepseek-v3-lm",
    "switch",
]


@contextmanager
def routing_of(model):
    """What routers returned and experts were called with, in plain forward passes."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        kind = type(module).__name__
        place = name.split(".experts")[0] + ".experts"  # An adapter wraps experts.
        if kind.endswith("Experts"):
            handles.append(
                module.register_forward_pre_hook(
                    lambda module, inputs, place=place: seen.setdefault(place, {}).update(
                        chosen=inputs[1], experts=module.num_experts
                    )
                )
            )
        elif kind.endswith("Router"):
            place = name.rsplit(".", 1)[0] + ".experts"
            handles.append(
                module.register_forward_hook(
                    lambda module, inputs, output, place=place: seen.setdefault(place, {}).update(
                        scores=output[2] if "Switch" in type(module).__name__ else output[0],
                        sigmoid="DeepseekV3" in type(module).__name__,
                    )
                )
            )
    yield seen
    for handle in handles:
        handle.remove()


def counted_of(model, sample, place):
    """Which of one sample's tokens a layer counts."""
    decodes = model.config.is_encoder_decoder and place.startswith("decoder")
    return sample["labels"][0] != -100 if decodes else sample["attention_mask"][0] == 1


def shares_of(seen, counted):
    """The share of a sample's tokens at each expert, counted one by one."""
    counts = torch.zeros(seen["experts"], dtype=torch.float64)
    choices = 1
    for token in counted.nonzero().flatten().tolist():
        choice = seen["chosen"][token]
        if choice.dim() == 2:  # A Switch Transformer's one-hot row, all zero for a dropped token.
            counts += choice[0].double()
            continue
        choices = len(choice)
        for expert in choice.tolist():
            counts[expert] += 1
    return counts / (choices * int(counted.sum()))


def own_loss(model, sample, strength, shares=None):
    """A sample's loss with its balancing loss, by their definitions."""
    with routing_of(model) as seen:
        loss = model(**sample).loss
    layers = []
    for place, layer in seen.items():
        counted = counted_of(model, sample, place)
        scores = layer["scores"].reshape(-1, layer["experts"])[counted].double()
        if layer["sigmoid"]:
            probabilities = scores.sigmoid() / scores.sigmoid().sum(-1, keepdim=True)
        else:
            probabilities = scores.softmax(-1)
        f = shares_of(layer, counted) if shares is None else shares[f"{place}.load"]
        layers.append(layer["experts"] * (f * probabilities.mean(0)).sum())
    return loss + strength * sum(layers) / len(layers)


def sum_of_clipped(model, batch, clipping_norm, strength, shares=None):
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    for index in range(len(batch["labels"])):
        loss = own_loss(model, rows(batch, slice(index, index + 1)), strength, shares)
        parts = torch.autograd.grad(
            loss, list(trained.values()), allow_unused=True, materialize_grads=True
        )
        gradient = dict(zip(trained, parts, strict=True))
        factor = min(1.0, clipping_norm / size(gradient))
        for name, part in gradient.items():
            total[name] += factor * part
    return total


@pytest.mark.parametrize("family", SEEN)
def test_loads_are_counted_token_by_token(family):
    model = build(family).eval()
    batch = make_batch(model, 4, 7)
    query = LoadQuery.of(model, 0.3)

    sums, _ = clipped_sum(model, batch, 1.0, loads=query)

    for name, experts in query.experts.items():
        expected = torch.zeros(experts, dtype=torch.float64)
        for index in range(4):
            sample = rows(batch, slice(index, index + 1))
            with routing_of(model) as seen, torch.no_grad():
                model(**sample)
            place = name.removesuffix(".load")
            shares = shares_of(seen[place], counted_of(model, sample, place))
            expected += query.scale * (shares - shares.mean())
        torch.testing.assert_close(sums[name], expected, rtol=1e-9, atol=1e-12)
    # Gradients are what they are without.
    alone, _ = clipped_sum(model, batch, 1.0)
    assert all(torch.equal(sums[name], alone[name]) for name in alone)
    assert sums.keys() == alone.keys() | query.experts.keys()


@pytest.mark.parametrize("family", ["dpmoe-bert", "mixtral-lm", "switch"])
def test_padding_is_not_counted(family):
    model = build(family)
    short = make_batch(model, 3, 5)
    long = {
        key: torch.nn.functional.pad(value, (0, 4), value=-100 if key == "labels" else 0)
        if value.dim() == 2
        else value
        for key, value in short.items()
    }
    query = LoadQuery.of(model, 0.3)
    for options in ({"loads": query}, {"balancing": BalancingLoss(0.5)}):
        one, _ = clipped_sum(model, short, 1.0, **options)
        other, _ = clipped_sum(model, long, 1.0, **options)
        assert difference(one, other) < 1e-9 * size(one)


@pytest.mark.parametrize("family", ["dpmoe-bert", "olmoe-lm", "switch"])
def test_one_sample_moves_gradients_and_loads_together_by_at_most_c(family):
    model = build(family)
    batch = join(make_batch(model, 3, 6), crowd_of(make_batch(model, 1, 6, seed=3), 1))
    clipping_norm, share = 0.1 * median_norm(model, batch), 0.2
    asked = ReleasedLoad(model, clipping_norm, 4.0, 0.01, through="loss", load_share=share)

    def joint(batch):
        return clipped_sum(
            model, batch, asked.gradient_norm, loads=asked.loads, balancing=asked.loss
        )[0]

    whole, loads = joint(batch), []
    for index in range(4):
        without = joint(rows(batch, [other for other in range(4) if other != index]))
        assert difference(whole, without) <= clipping_norm * (1 + 1e-5)
        moved = {name: whole[name] - without[name] for name in asked.loads.experts}
        loads.append(size(moved))
    assert max(loads) <= math.sqrt(share) * clipping_norm * (1 + 1e-9)
    if family == "olmoe-lm":
        # All of the crowd's tokens are alike and go to the same experts: no load is larger.
        assert loads[3] == pytest.approx(math.sqrt(share) * clipping_norm)


def test_a_sample_of_which_nothing_is_finite_has_no_load():
    model = build("dpmoe-bert")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("layers.1.", "classifier.")))
    batch = make_batch(model, 3, 5)
    del batch["input_ids"]
    batch["hidden_states"] = torch.randn(3, 5, 16, dtype=torch.float64)
    query = LoadQuery.of(model, 0.3)
    expected, _ = clipped_sum(model, rows(batch, [0, 2]), 1.0, loads=query)
    batch["hidden_states"][1, 0, 0] = math.nan
    sums, _ = clipped_sum(model, batch, 1.0, loads=query)
    assert all(torch.equal(sums[name], expected[name]) for name in expected)
    empty, _ = clipped_sum(model, rows(batch, []), 1.0, loads=query)
    assert empty.keys() == sums.keys()
    assert not any(part.any() for part in empty.values())


@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("family", SEEN)
def test_a_balancing_loss_is_the_samples_own(family, public):
    model = build(family).eval()
    batch = make_batch(model, 4, 6)
    shares = None
    if public:
        generator = torch.Generator().manual_seed(3)
        experts = LoadQuery.of(model, 1.0).experts.items()
        shares = {name: torch.rand(count, generator=generator).double() for name, count in experts}
    clipping_norm = median_norm(model, batch)

    sums, _ = clipped_sum(model, batch, clipping_norm, balancing=BalancingLoss(0.7, shares))

    expected = sum_of_clipped(model, batch, clipping_norm, 0.7, shares)
    # Transformers' softmax of scores is in float32 in some families; DeepSeek's whole router is.
    assert difference(sums, expected) <= max(1e-9, 5 * TOLERANCE[family]) * size(expected)
    without, _ = clipped_sum(model, batch, clipping_norm)
    assert difference(sums, without) > 1e-4 * size(expected)


def test_checkpointed_layers_have_the_same_loads_and_losses():
    model = build("mixtral-lm")
    batch = make_batch(model, 4, 6)
    options = {"loads": LoadQuery.of(model, 0.3), "balancing": BalancingLoss(0.7)}
    plain, norms = clipped_sum(model, batch, 1.0, **options)
    model.gradient_checkpointing_enable()
    again, norms_again = clipped_sum(model, batch, 1.0, **options)
    assert difference(plain, again) <= 1e-12 * size(plain)
    assert torch.allclose(norms, norms_again, rtol=1e-12, atol=0)


def test_under_autocast_shares_and_probabilities_are_not_rounded():
    generator = torch.Generator().manual_seed(5)
    counted_BT = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    layer = RoutedLayer("layer", None, experts=3, choices=1)
    routes = Routes({}, {"layer": counted_BT}, None, BalancingLoss(1.0))
    rows_NE = torch.rand(8, 3, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        mean_BE = routes._mean(layer, rows_NE)
    assert torch.allclose(mean_BE[0], rows_NE[:4].mean(0), rtol=1e-6)
    assert torch.allclose(mean_BE[1], rows_NE[4:7].mean(0), rtol=1e-6)


@pytest.mark.parametrize("family", SEEN)
def test_the_engine_proves_loads_and_losses_before_it_sees_data(family):
    model = build(family)
    released = ReleasedLoad(model, 1.0, 8.0, 0.1, through="loss")
    tolerance = max(1e-9, TOLERANCE[family])
    check_model(model, tolerance, loads=released.loads, balancing=released.loss)
    check_model(model, tolerance, balancing=SequenceBalancing(model, 1.0, 0.1).loss)


def test_a_load_that_depends_on_mates_is_found(monkeypatch):
    """As if shares were taken of all tokens of the batch."""
    model = build("dpmoe-bert")
    released = ReleasedLoad(model, 1.0, 8.0, 0.1)

    def over_the_batch(shares_BE, bound):
        return shares_BE - shares_BE.mean() * len(shares_BE)

    monkeypatch.setattr("dpmoe_trainer.dp.routes._bounded", over_the_batch)
    with pytest.raises(NotPerSample, match=r"experts\.load"):
        check_model(model, loads=released.loads)


def test_loads_have_the_noise_that_gradients_have():
    model = build("dpmoe-bert")
    released = ReleasedLoad(model, 0.4, 8.0, 0.1)
    sums, _ = clipped_sum(model, make_batch(model, 3, 5), 0.4, loads=released.loads)
    (name,) = released.loads.experts
    added = []
    for step in range(400):
        noised = add_noise({name: sums[name].clone()}, 1.5, 0.4, NoiseKey(bytes(32)), step)
        added.append(noised[name] - sums[name])
    noise = torch.stack(added)
    error = 3 * 0.6 / math.sqrt(2 * noise.numel())
    assert float(noise.pow(2).mean().sqrt()) == pytest.approx(0.6, abs=error)
    correlations = torch.corrcoef(noise.T).fill_diagonal_(0)
    assert correlations.abs().max() < 4 / math.sqrt(400)


def test_a_released_load_lowers_the_bias_of_experts_that_got_more():
    model = build("dpmoe-bert")
    released = ReleasedLoad(model, 1.0, 10.0, 0.25)
    (name,) = released.loads.experts
    bias = model.layers[1].router.selection_bias
    # Ten samples' shares of 0.55, 0.2, 0.15 and 0.1, and something that all experts have.
    deviation = torch.tensor([0.55, 0.2, 0.15, 0.1], dtype=torch.float64) - 0.25
    sums = {name: 10 * released.loads.scale * deviation + 3.0, "layers.1.router.weight": bias}
    released.take(sums)
    assert list(sums) == ["layers.1.router.weight"]
    expected = -0.25 * torch.tensor([1.0, -0.2, -0.4, -0.6], dtype=torch.float64)
    torch.testing.assert_close(bias, expected)
    released.take({name: torch.zeros(4, dtype=torch.float64)})
    torch.testing.assert_close(bias, expected)


def test_a_released_load_aims_the_loss_at_experts_that_got_more():
    model = build("mixtral-lm")
    released = ReleasedLoad(model, 1.0, 10.0, 0.25, through="loss")
    names = list(released.loads.experts)
    assert all((released.loss.shares[name] == 0.25).all() for name in names)
    deviation = torch.tensor([0.3, -0.1, -0.1, -0.1], dtype=torch.float64)
    released.take(dict.fromkeys(names, 10 * released.loads.scale * deviation))
    for name in names:
        torch.testing.assert_close(released.loss.shares[name], 0.25 + deviation)
    assert released.loss.strength == 0.25


def test_a_selection_bias_moves_tokens_and_nothing_else(tmp_path):
    model = build("dpmoe-bert").eval()
    router = model.layers[1].router
    tokens = torch.randn(30, 16, dtype=torch.float64)
    scores, _, before = router(tokens)
    router.selection_bias[2] = 100.0
    again, weights, chosen = router(tokens)
    assert torch.equal(again, scores)
    assert (chosen == 2).any(1).all()
    assert not (before == 2).any(1).all()
    torch.testing.assert_close(weights, scores.gather(1, chosen).softmax(-1))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.layers[1].router.selection_bias.tolist() == [0, 0, 100, 0]


def test_deepseeks_own_bias_is_moved():
    model = build("deepseek-v3-lm")
    released = ReleasedLoad(model, 1.0, 10.0, 0.25)
    released.take(
        {
            name: 10 * released.loads.scale * torch.tensor([0.75, -0.25, -0.25, -0.25])
            for name in released.loads.experts
        }
    )
    biases = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert [bias.tolist() for bias in biases] == [[-0.25, 0.25, 0.25, 0.25]]


def test_what_cannot_be_balanced_is_refused_by_name():
    mixtral = build("mixtral-lm")
    with pytest.raises(NotPerSample, match="MixtralTopKRouter has no bias on its choice"):
        ReleasedLoad(mixtral, 1.0, 8.0, 0.1)
    with pytest.raises(NotPerSample, match="no layer of experts"):
        SequenceBalancing(torch.nn.Linear(2, 2), 1.0, 0.1)
    with pytest.raises(ValueError, match="load_share"):
        ReleasedLoad(mixtral, 1.0, 8.0, 0.1, through="loss", load_share=1.0)
    for layer in mixtral.model.layers:
        layer.mlp.gate.top_k = 4
    with pytest.raises(NotPerSample, match="all experts"):
        LoadQuery.of(mixtral, 1.0)


def test_no_balancing_asks_for_nothing():
    nothing = Balancing(0.3)
    assert (nothing.gradient_norm, nothing.loads, nothing.loss) == (0.3, None, None)
    sums = {"a": torch.ones(2)}
    nothing.take(sums)
    assert sums["a"].tolist() == [1, 1]
