"""Replicas and shards of one model: one key gives one model, bit by bit, and no seed has a say."""

import copy

import numpy as np
import pytest
import torch
from tests.trainer.families import build, make_batch, rows

from dpmoe_trainer.contract import OptimizerPlan
from dpmoe_trainer.dp import clipped_sum
from dpmoe_trainer.dp.balancing import ReleasedLoad
from dpmoe_trainer.dp.noise import NoiseKey, add_noise
from dpmoe_trainer.dp.sampling import poisson_draw
from dpmoe_trainer.methods.dp_sgd import Updater

SIGMA, CLIP, EXPECTED = 1.1, 0.4, 8.0


class Replica:
    """One of several processes that hold the same model and compute parts of each batch."""

    def __init__(self, model, optimizer, key):
        self.model = copy.deepcopy(model)
        plan = OptimizerPlan(name=optimizer, learning_rate=0.05, weight_decay=0.1)
        self.updater = Updater(self.model, plan, 4, EXPECTED, SIGMA * CLIP)
        self.balancing = ReleasedLoad(self.model, CLIP, EXPECTED, 0.1)
        self.key = key

    def part(self, batch):
        return clipped_sum(
            self.model, batch, self.balancing.gradient_norm, loads=self.balancing.loads
        )[0]

    def release(self, total, step):
        noised = add_noise(total, SIGMA, CLIP, self.key, step)
        self.balancing.take(noised)
        self.updater.update(noised)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adambc"])
def test_replicas_stay_identical(optimizer):
    model = build("dpmoe-bert", torch.float32)
    key = NoiseKey(bytes(range(32)))
    replicas = [Replica(model, optimizer, NoiseKey(key.secret)) for _ in range(2)]
    for step in range(4):
        batch = make_batch(model, 6, 5, seed=step)
        # The second step has nothing on one of them.
        split = 0 if step == 1 else 2
        parts = [
            replicas[0].part(rows(batch, slice(0, split))),
            replicas[1].part(rows(batch, slice(split, 6))),
        ]
        # What an all-reduce gives to each.
        totals = [{n: parts[0][n] + parts[1][n] for n in parts[0]} for _ in replicas]
        for number, (replica, total) in enumerate(zip(replicas, totals, strict=True)):
            torch.manual_seed(number)  # Nothing on a replica of its own has a say.
            replica.release(total, step)
    one, other = (replica.model.state_dict() for replica in replicas)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_by_expert_have_the_noise_of_the_whole(shards):
    model = build("dpmoe-bert", torch.float32)
    released = ReleasedLoad(model, CLIP, EXPECTED, 0.1)
    sums, _ = clipped_sum(model, make_batch(model, 4, 5), CLIP, loads=released.loads)
    key = NoiseKey(bytes(range(32)))
    whole = add_noise({name: total.clone() for name, total in sums.items()}, SIGMA, CLIP, key, 2)
    size = 4 // shards
    for first in range(0, 4, size):
        shard = {
            name: total[first : first + size].clone()
            for name, total in sums.items()
            if ".experts." in name
        }
        assert any(name.endswith(".load") for name in shard)
        for name, noised in add_noise(
            shard, SIGMA, CLIP, key, 2, dict.fromkeys(shard, first)
        ).items():
            assert torch.equal(noised, whole[name][first : first + size])


def test_no_seed_reaches_noise_or_sampling():
    """There is no mode that is not secure: keys are the system's, streams are ciphers'."""

    def seeded():
        torch.manual_seed(7)
        np.random.seed(7)
        key = NoiseKey()
        noise = add_noise({"w": torch.zeros(50)}, SIGMA, CLIP, key, 0)["w"]
        return noise, poisson_draw(200, 0.5, key, 0)

    (noise, drawn), (other_noise, other_drawn) = seeded(), seeded()
    assert not torch.equal(noise, other_noise)
    assert not np.array_equal(drawn, other_drawn)
    # And drawing leaves torch's and numpy's generators where they were.
    torch.manual_seed(7)
    np.random.seed(7)
    expected = torch.rand(3), np.random.rand(3)
    seeded()
    torch.testing.assert_close(
        (torch.rand(3), torch.from_numpy(np.random.rand(3))),
        (expected[0], torch.from_numpy(expected[1])),
    )
