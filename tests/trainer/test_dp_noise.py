"""Noise: its distribution, and what it depends on."""

import math

import pytest
import torch
from scipy import stats

from dpmoe_trainer.dp.noise import NoiseKey, add_noise

KEY = NoiseKey(bytes(range(32)))
SIGMA, CLIP = 1.7, 0.25


def noise_of(shape, name="layer.weight", key=KEY, step=0, **settings):
    zero = {name: torch.zeros(shape, dtype=torch.float64)}
    return add_noise(zero, SIGMA, CLIP, key, step, **settings)[name]


def test_it_is_normal_with_standard_deviation_sigma_times_c():
    noise = noise_of((300, 400)).flatten() / (SIGMA * CLIP)
    assert stats.kstest(noise.numpy(), "norm").pvalue > 0.01
    assert float(noise.std()) == pytest.approx(1, abs=4 / math.sqrt(2 * noise.numel()))
    lagged = float((noise[1:] * noise[:-1]).mean())
    assert abs(lagged) < 4 / math.sqrt(noise.numel())


def test_every_expert_gets_it_whether_tokens_reached_it_or_not():
    sums = {
        "layers.0.experts.up_proj": torch.zeros(4, 60, 70),
        "layers.0.experts.up_proj_bias": torch.zeros(4, 3000),
        "classifier.weight": torch.zeros(50, 60),
    }
    sums["layers.0.experts.up_proj"][1] = 5.0  # The one expert that was hit.
    noised = add_noise({name: value.clone() for name, value in sums.items()}, SIGMA, CLIP, KEY, 3)
    assert noised.keys() == sums.keys()
    for name, gradient in sums.items():
        for noise in (noised[name] - gradient).flatten(1):
            error = 4 * SIGMA * CLIP / math.sqrt(2 * noise.numel())
            assert float(noise.std()) == pytest.approx(SIGMA * CLIP, abs=max(error, 0.15))
            assert noise.count_nonzero() == noise.numel()


def test_no_two_streams_are_correlated():
    streams = [
        *noise_of((3, 5000), name="layers.0.experts.up_proj"),
        *noise_of((3, 5000), name="layers.1.experts.up_proj"),
        *noise_of((3, 5000), name="layers.0.experts.up_proj", step=1),
        noise_of((5000,), name="layers.0.router.weight"),
        noise_of((5000,), name="layers.0.router.weight", key=NoiseKey()),
        torch.from_numpy(KEY.uniform(5000, "poisson draw", 0)),
    ]
    correlations = torch.corrcoef(torch.stack(streams)).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / math.sqrt(5000)


def test_the_same_context_gives_the_same_noise():
    assert torch.equal(noise_of((7, 9)), noise_of((7, 9)))
    assert not torch.equal(noise_of((7, 9)), noise_of((7, 9), key=NoiseKey()))


def test_it_does_not_depend_on_the_sums_or_on_the_other_parameters():
    one, two = torch.randn(2, 8, dtype=torch.float64)
    noise_one = add_noise({"a": one.clone()}, SIGMA, CLIP, KEY, 0)["a"] - one
    both = {"b": torch.zeros(3), "a": two.clone()}
    noise_two = add_noise(both, SIGMA, CLIP, KEY, 0)["a"] - two
    assert torch.allclose(noise_one, noise_two, rtol=0, atol=1e-14)


def test_sharding_by_expert_changes_nothing():
    name = "layers.0.experts.down_proj"
    whole = noise_of((6, 4, 5), name=name)
    low = noise_of((2, 4, 5), name=name)
    high = noise_of((4, 4, 5), name=name, first_experts={name: 2})
    assert torch.equal(whole, torch.cat([low, high]))


def test_sharding_by_rows_changes_nothing():
    whole = noise_of((50, 7), name="a")
    parts = [noise_of((r, 7), name="a", offsets={"a": 7 * at}) for at, r in ((0, 20), (20, 30))]
    assert torch.equal(whole, torch.cat(parts))


def test_a_parameter_may_lie_in_memory_in_any_order():
    transposed = {"a": torch.zeros(9, 7, dtype=torch.float64).T}
    assert torch.equal(add_noise(transposed, SIGMA, CLIP, KEY, 0)["a"], noise_of((7, 9), name="a"))


def test_the_gradients_are_overwritten_and_keep_their_type():
    gradients = {"a": torch.ones(5), "b": torch.ones(5, dtype=torch.float64)}
    before = dict(gradients)
    assert add_noise(gradients, SIGMA, CLIP, KEY, 0) is gradients
    assert all(gradients[name] is before[name] for name in before)
    assert [gradient.dtype for gradient in gradients.values()] == [torch.float32, torch.float64]
    assert all(gradient.ne(1).all() for gradient in gradients.values())


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_noise_that_protects_nothing_is_refused(value):
    with pytest.raises(ValueError, match="noise_multiplier"):
        add_noise({}, value, CLIP, KEY, 0)
    with pytest.raises(ValueError, match="clipping_norm"):
        add_noise({}, SIGMA, value, KEY, 0)


def test_keys_are_fresh_whole_and_not_shown():
    assert NoiseKey().secret != NoiseKey().secret
    assert str(KEY) == repr(KEY) == "NoiseKey()"
    with pytest.raises(ValueError, match="32 bytes"):
        NoiseKey(b"short")
