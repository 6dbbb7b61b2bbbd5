"""DP-AdamBC against the paper's algorithm, number by number, and what its correction is for."""

import math

import pytest
import torch

from dpmoe_trainer.contract import OptimizerPlan
from dpmoe_trainer.methods.adam_bc import AdamBC
from dpmoe_trainer.methods.dp_sgd import ADAM_BETAS, Updater

BETA1, BETA2 = 0.9, 0.98


def algorithm_1(start, gradients, lr, phi, floor, decay=0.0):
    """One number through algorithm 1 of Tang et al. 2023, with AdamW's decay."""
    value, m, v = start, 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * g * g
        m_hat, v_hat = m / (1 - BETA1**t), v / (1 - BETA2**t)
        value = value * (1 - lr * decay) - lr * m_hat / math.sqrt(max(v_hat - phi, floor))
    return value


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_it_is_the_papers_algorithm(decay):
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.ones(3, 2).double()), torch.nn.Parameter(torch.ones(4))]
    noise, lr, floor = 0.4, 0.05, 0.01
    optimizer = AdamBC(parameters, lr, noise, weight_decay=decay, floor=floor)
    seen = []
    for _ in range(7):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        seen.append([p.grad.clone() for p in parameters])
        optimizer.step()
    for index, parameter in enumerate(parameters):
        for place, value in enumerate(parameter.detach().flatten().tolist()):
            gradients = [float(step[index].flatten()[place]) for step in seen]
            expected = algorithm_1(1.0, gradients, lr, noise**2, floor, decay)
            assert value == pytest.approx(expected, rel=1e-5)


def test_without_noise_it_is_adamw():
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (torch.nn.Parameter(torch.ones(50).double()) for _ in range(2))
    optimizers = [
        AdamBC([ours], 0.03, 0.0, weight_decay=0.2),
        torch.optim.AdamW([theirs], 0.03, betas=(BETA1, BETA2), eps=0.0, weight_decay=0.2),
    ]
    for _ in range(6):
        gradient = torch.randn(50, generator=generator).double()
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)


def test_the_correction_takes_the_noise_out_of_the_second_moment():
    """What is left is the gradients' own, where they are below the noise and above it."""
    generator = torch.Generator().manual_seed(2)
    true = torch.tensor([0.5, 1.5]).double().repeat_interleave(20_000)
    parameter = torch.nn.Parameter(torch.zeros_like(true))
    optimizer = AdamBC([parameter], 1.0, noise=1.0, betas=(0.9, 0.999), floor=1e-3)
    for _ in range(300):
        signs = torch.randint(0, 2, true.shape, generator=generator) * 2 - 1
        parameter.grad = true * signs + torch.randn(true.shape, generator=generator).double()
        optimizer.step()
    second = optimizer.state[parameter]["second"] / (1 - 0.999**300)
    corrected = (second - 1.0).view(2, -1).mean(1)
    torch.testing.assert_close(corrected, torch.tensor([0.25, 2.25]).double(), rtol=0.02, atol=0)


def test_the_updater_tells_it_the_noise_on_the_mean_gradient():
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    plan = OptimizerPlan(name="adambc", learning_rate=0.5)
    updater = Updater(model, plan, steps=10, expected_batch=8.0, noise=1.6)
    sums = {"weight": torch.full((2, 3), 4.0), "bias": torch.zeros(2)}
    updater.update(sums)
    # v̂ = g² after one step; the mean gradient is 4/8, and the noise on it has variance (1.6/8)².
    expected = before - 0.5 * 0.5 / math.sqrt(0.5**2 - 0.2**2)
    torch.testing.assert_close(model.weight.detach(), expected)
    assert ADAM_BETAS == (BETA1, BETA2)


def test_the_floor_bounds_what_little_is_left_of_the_second_moment():
    parameter = torch.nn.Parameter(torch.zeros(1).double())
    optimizer = AdamBC([parameter], 1.0, noise=0.5)
    parameter.grad = torch.tensor([0.1]).double()
    optimizer.step()
    assert float(parameter.detach()) == pytest.approx(-0.1 / math.sqrt(0.1 * 0.25))


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_settings_without_meaning_are_refused(value):
    parameter = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="noise"):
        AdamBC([parameter], 0.1, value)
    with pytest.raises(ValueError, match="floor"):
        AdamBC([parameter], 0.1, 1.0, floor=value)
    with pytest.raises(ValueError, match="betas"):
        AdamBC([parameter], 0.1, 1.0, betas=(0.9, value))
    with pytest.raises(ValueError, match="closure"):
        AdamBC([parameter], 0.1, 1.0).step(lambda: 0.0)
