"""The definition of a clipped gradient sum, and the checks that every bug must fail by name."""

import copy
import math
from contextlib import contextmanager
from unittest import mock

import torch
from tests.trainer.families import join, rows

from dpmoe_trainer.dp import clipped_sum, engine
from dpmoe_trainer.dp.noise import NoiseKey


def one_at_a_time(model, batch, clipping_norm):
    """Each sample's own loss, its gradient clipped, all added up."""
    model = copy.deepcopy(model).eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    norms = []
    for index in range(len(batch["labels"])):
        loss = model(**rows(batch, slice(index, index + 1))).loss
        gradients = torch.autograd.grad(
            loss, list(trained.values()), allow_unused=True, materialize_grads=True
        )
        norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients))
        norms.append(norm)
        for name, gradient in zip(trained, gradients, strict=True):
            total[name] += gradient * min(1.0, clipping_norm / max(norm, 1e-300))
    return total, torch.tensor(norms, dtype=torch.float64)


def size(gradients):
    return math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients.values()))


def difference(one, other):
    assert one.keys() == other.keys()
    return size({name: one[name].double() - other[name].double() for name in one})


def median_norm(model, batch):
    """A clipping norm that clips half of the samples."""
    return float(clipped_sum(model, batch, math.inf)[1].median())


def check_exact(model, batch, clipping_norm, tolerance, reference=None):
    """Norms, sum, and every parameter's part of it are those of single samples."""
    sums, norms = clipped_sum(model, batch, clipping_norm)
    expected, expected_norms = one_at_a_time(reference or model, batch, clipping_norm)
    assert (expected_norms > clipping_norm).any()
    assert (expected_norms <= clipping_norm).any()
    assert torch.allclose(norms, expected_norms, rtol=tolerance, atol=0), "norms"
    for name, gradient in expected.items():
        apart = difference({name: sums[name]}, {name: gradient})
        assert apart <= tolerance * size(expected), f"the sum at {name}"


def check_isolation(model, sample, mates, clipping_norm, tolerance):
    """A sample's contribution is the same beside any mates."""
    alone, _ = clipped_sum(model, sample, clipping_norm)
    for others in mates:
        batch = join(others, sample)
        with only_sample(len(batch["labels"]) - 1):
            beside, _ = clipped_sum(model, batch, clipping_norm)
        assert difference(beside, alone) <= tolerance * size(alone), "isolation"


@contextmanager
def only_sample(index):
    """Has one sample of a batch contribute as ever, and the others nothing."""
    clip_factors = engine.clip_factors
    seen = []

    def chosen_only(norms, *how):
        # The engine may compute a batch in parts, one after another.
        place = sum(seen) + torch.arange(len(norms))
        seen.append(len(norms))
        return clip_factors(norms, *how) * (place == index)[:, None]

    with mock.patch.object(engine, "clip_factors", chosen_only):
        yield


def check_bound(model, batch, clipping_norm, sum_of=clipped_sum, tolerance=1e-5):
    """Leaving a sample out changes the sum, at each parameter and in all, by C at most."""
    whole, _ = sum_of(model, batch, clipping_norm)
    samples = len(batch["labels"])
    for index in range(samples):
        others = [other for other in range(samples) if other != index]
        without, _ = sum_of(model, rows(batch, others), clipping_norm)
        for name, total in whole.items():
            moved = difference({name: total}, {name: without[name]})
            assert moved <= clipping_norm * (1 + tolerance), f"bound at {name}"
        assert difference(whole, without) <= clipping_norm * (1 + tolerance), "bound"


def check_noise(add_noise, sums, unhit, noise_multiplier=0.7, clipping_norm=0.3):
    """Noise of standard deviation σC on every number, those of experts without tokens too.

    Args:
        add_noise: What adds it.
        sums: Clipped sums by name.
        unhit: A fused weight's name, and which of its experts got no token.
    """
    noised = {name: total.clone() for name, total in sums.items()}
    noised = add_noise(noised, noise_multiplier, clipping_norm, NoiseKey(bytes(32)), 3)
    expected = noise_multiplier * clipping_norm
    added = {name: (noised[name] - total).flatten().double() for name, total in sums.items()}
    name, experts = unhit
    assert experts.any()
    assert not sums[name][experts].any()
    by_expert = added[name].view(len(experts), -1)
    everywhere = {
        "unhit experts": by_expert[experts].flatten(),
        "hit experts": by_expert[~experts].flatten(),
        **added,
    }
    for place, noise in everywhere.items():
        if noise.numel() >= 100:
            # The variance, within three standard errors.
            error = 3 * expected**2 * math.sqrt(2 / noise.numel())
            assert abs(float(noise.pow(2).mean()) - expected**2) <= error, f"noise at {place}"
