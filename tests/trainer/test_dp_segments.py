"""Norms over routed segments, against gradients formed expert by expert and sample by sample."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpmoe_trainer.dp import kernels
from dpmoe_trainer.dp.ghost import squared_norms_of_pairs
from dpmoe_trainer.dp.segments import Segments, squared_norms


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def _either(request, monkeypatch):
    """Every test here holds with the compiled kernel and without."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "library", lambda: None)


def routed(samples, tokens, experts, choices, inputs, outputs, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(samples * tokens, experts, generator=generator)
    # Skewed, so that segments of many lengths and empty ones occur.
    expert = (scores * torch.arange(1, experts + 1)).topk(choices).indices
    sample = torch.arange(samples).repeat_interleave(tokens)
    segments = Segments.of(expert, sample, experts, samples)
    rows = samples * tokens * choices
    a = torch.randn(rows, inputs, generator=generator, dtype=dtype)
    g = torch.randn(rows, outputs, generator=generator, dtype=dtype)
    return segments, expert.flatten()[segments.slot], sample[segments.token], a, g


def formed(expert, sample, a, g, samples, experts):
    """‖Σ g·aᵀ‖² and ‖Σ g‖² by (expert, sample), each added up over experts."""
    weights, biases = torch.zeros(samples), torch.zeros(samples)
    for b in range(samples):
        for e in range(experts):
            chosen = (sample == b) & (expert == e)
            weights[b] += (g[chosen].T @ a[chosen]).pow(2).sum()
            biases[b] += g[chosen].sum(0).pow(2).sum()
    return weights, biases


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    samples=st.integers(1, 5),
    tokens=st.integers(1, 20),
    experts=st.integers(1, 6),
    widths=st.sampled_from([(3, 4), (64, 32)]),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_norms_are_those_of_the_formed_gradients(samples, tokens, experts, widths, seed, data):
    choices = data.draw(st.integers(1, experts))
    segments, expert, sample, a, g = routed(samples, tokens, experts, choices, *widths, seed)
    weights, biases = formed(expert, sample, a, g, samples, experts)
    assert torch.allclose(squared_norms(a, g, segments, True, False).float(), weights, rtol=1e-5)
    assert torch.allclose(squared_norms(a, g, segments, False, True).float(), biases, rtol=1e-5)
    both = squared_norms(a, g, segments, True, True).float()
    assert torch.allclose(both, weights + biases, rtol=1e-5)


def test_rows_are_in_expert_and_sample_order():
    segments, expert, sample, _, _ = routed(4, 9, 5, 2, 1, 1, seed=3)
    pairs = list(zip(expert.tolist(), sample.tolist(), strict=True))
    assert pairs == sorted(pairs)
    assert segments.row_sample.tolist() == sample.tolist()
    assert segments.rows_per_expert == [expert.eq(e).sum() for e in range(5)]


@pytest.mark.parametrize("spoiled", range(5))
@pytest.mark.parametrize("widths", [(3, 4), (64, 32)])
def test_an_infinite_row_spoils_its_own_sample_only(widths, spoiled):
    segments, _, sample, a, g = routed(5, 17, 3, 2, *widths, seed=1)
    before = squared_norms(a, g, segments, True, True)
    a[sample == spoiled], g[sample == spoiled] = math.inf, math.nan
    after = squared_norms(a, g, segments, True, True)
    others = [index for index in range(5) if index != spoiled]
    assert torch.equal(after[others], before[others])
    assert not after[spoiled].isfinite()


@pytest.mark.parametrize("offset", [0.0, 1e-4, 1e-3, 1e-2, 1e-1])
def test_cancelling_rows_never_pass_for_a_smaller_gradient(offset):
    """In float32 the pairs' sum is all rounding here; the norm may be over-, not understated."""
    generator = torch.Generator().manual_seed(0)
    n, inputs, outputs = 20, 300, 300
    a = torch.ones(n, 1) * torch.randn(1, inputs, generator=generator)
    g = 100 * torch.randn(n // 2, outputs, generator=generator)
    g = torch.cat([g, offset - g])
    true = (g.double().T @ a.double()).pow(2).sum()
    segments = Segments.of(torch.zeros(n, 1, dtype=torch.long), torch.zeros(n).long(), 1, 1)
    assert float(squared_norms(a, g, segments, True, False)) >= 0.99 * float(true)


def test_the_floor_leaves_ordinary_sums_alone():
    x = torch.randn(6, 50, 8, generator=torch.Generator().manual_seed(0))
    pairs = (x @ x.transpose(1, 2)) ** 2
    assert torch.equal(squared_norms_of_pairs(pairs), pairs.sum((1, 2)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("widths", [(3, 4), (16, 33), (100, 65)])
def test_the_kernel_and_torch_give_the_same_norms(dtype, tolerance, widths, monkeypatch):
    """Of segments from one row to more than it pays to compare pairs of."""
    expert = torch.zeros(300, 1, dtype=torch.long)
    length = torch.tensor([1, 2, 3, 4, 5, 7, 8, 13, 31, 57, 169])
    sample = torch.arange(len(length)).repeat_interleave(length)
    segments = Segments.of(expert, sample, 1, len(length))
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn(300, width, generator=generator, dtype=dtype) for width in widths)
    monkeypatch.undo()
    assert kernels.library() is not None, "these tests need a C++ compiler"
    compiled = squared_norms(a, g, segments, True, False)
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert torch.allclose(
        compiled, squared_norms(a, g, segments, True, False), rtol=tolerance, atol=0
    )
    one_by_one = torch.stack(
        [
            (part_g.T.double() @ part_a.double()).pow(2).sum()
            for part_a, part_g in zip(
                a.split(length.tolist()), g.split(length.tolist()), strict=True
            )
        ]
    )
    assert torch.allclose(compiled, one_by_one, rtol=tolerance, atol=0)


def test_rows_may_lie_in_memory_in_any_order():
    segments, _, _, a, g = routed(3, 8, 2, 1, 16, 12, seed=2)
    expected = squared_norms(a, g, segments, True, True)
    strided = torch.stack([a, a], 2)[..., 1], g.T.contiguous().T
    assert torch.equal(squared_norms(*strided, segments, True, True), expected)
