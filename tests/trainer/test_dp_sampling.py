"""Poisson sampling: the rate, the independence, and the split of a drawn batch."""

import math

import numpy as np
import pytest

from dpmoe_trainer.dp.sampling import (
    Group,
    NoiseKey,
    lockstep_batches,
    physical_batches,
    poisson_draw,
)

KEY = NoiseKey(bytes(range(32)))
UNITS, RATE, STEPS = 400, 0.07, 500


@pytest.fixture(scope="module")
def included():
    """[steps, units] whether each unit was drawn."""
    table = np.zeros((STEPS, UNITS), dtype=bool)
    for step in range(STEPS):
        table[step, poisson_draw(UNITS, RATE, KEY, step)] = True
    return table


def test_units_are_drawn_at_the_rate(included):
    assert included.mean() == pytest.approx(RATE, abs=4 * math.sqrt(RATE / UNITS / STEPS))
    worst = np.abs(included.mean(0) - RATE).max()
    assert worst < 5 * math.sqrt(RATE / STEPS)


def test_batch_sizes_vary_as_those_of_independent_draws(included):
    variance = included.sum(1).var()
    assert variance == pytest.approx(UNITS * RATE * (1 - RATE), rel=4 * math.sqrt(2 / STEPS))


def test_units_and_steps_are_drawn_independently(included):
    limit = 5.5 / math.sqrt(STEPS)
    assert np.abs(np.triu(np.corrcoef(included.T.astype(float)), 1)).max() < limit
    lagged = np.corrcoef(included[1:].ravel(), included[:-1].ravel())[0, 1]
    assert abs(lagged) < 5 / math.sqrt(UNITS * STEPS)


def test_a_draw_hangs_on_key_and_step_only():
    draw = poisson_draw(UNITS, RATE, KEY, 3)
    assert np.array_equal(draw, poisson_draw(UNITS, RATE, NoiseKey(bytes(range(32))), np.int64(3)))
    assert not np.array_equal(draw, poisson_draw(UNITS, RATE, KEY, 4))
    assert not np.array_equal(draw, poisson_draw(UNITS, RATE, NoiseKey(), 3))


def test_indices_are_ascending_and_distinct():
    draw = poisson_draw(UNITS, 0.5, KEY, 0)
    assert draw.dtype == np.int64
    assert (np.diff(draw) > 0).all()
    assert np.array_equal(poisson_draw(UNITS, 1.0, KEY, 0), np.arange(UNITS))


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan])
def test_rates_that_are_no_probabilities_are_refused(rate):
    with pytest.raises(ValueError, match="sampling_rate"):
        poisson_draw(UNITS, rate, KEY, 0)
    with pytest.raises(ValueError, match="units"):
        poisson_draw(0, RATE, KEY, 0)


def test_physical_batches_split_the_logical_one():
    drawn = poisson_draw(UNITS, 0.5, KEY, 0)
    lengths = np.random.default_rng(0).integers(1, 60, UNITS)
    batches = physical_batches(drawn, 32, lengths)
    assert all(len(batch) <= 32 for batch in batches)
    assert sorted(np.concatenate(batches)) == list(drawn)
    in_order = lengths[np.concatenate(batches)]
    assert (np.diff(in_order) >= 0).all()
    assert np.array_equal(np.concatenate(physical_batches(drawn, 7)), drawn)
    assert physical_batches(drawn[:0], 32, lengths) == []
    with pytest.raises(ValueError, match="physical batch size"):
        physical_batches(drawn, 0)


def random_units(seed: int) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Drawn units of 1 to 40 rows, most of one, over rows in no order; and all rows' lengths."""
    generator = np.random.default_rng(seed)
    counts = np.where(generator.random(60) < 0.8, 1, generator.integers(2, 41, 60))
    rows = generator.permutation(2000)[: counts.sum()]
    units = [tuple(part.tolist()) for part in np.split(rows, np.cumsum(counts)[:-1])]
    return units, generator.integers(1, 60, 2000)


def rows_of(group: Group) -> list[int]:
    return np.concatenate([np.concatenate(parts) for parts in group.batches]).tolist()


@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("ranks", [1, 2, 5, 16])
def test_ranks_share_every_drawn_unit_once(ranks, size, by_length):
    units, lengths = random_units(ranks * size)
    groups = lockstep_batches(units, ranks, size, lengths if by_length else None)

    users = [unit for unit in units if len(unit) > 1]
    assert [group.unit_rows for group in groups] == [*map(len, users), 1]
    for group, user in zip(groups, users, strict=False):
        assert sorted(rows_of(group)) == sorted(user)
    assert sorted(rows_of(groups[-1])) == sorted(unit[0] for unit in units if len(unit) == 1)

    for group in groups:
        assert all(len(parts) == ranks for parts in group.batches)
        assert all(len(rows) <= size for parts in group.batches for rows in parts)
        assert len(group.batches) == math.ceil(len(rows_of(group)) / (ranks * size))
        shares = [np.concatenate(group.of(rank)) for rank in range(ranks)]
        counts = [len(share) for share in shares]
        assert max(counts) - min(counts) <= 1
        if by_length:
            work = [lengths[share].sum() for share in shares]
            assert max(work) - min(work) <= lengths.max()


def test_one_rank_computes_the_physical_batches_themselves():
    drawn = poisson_draw(UNITS, 0.5, KEY, 0)
    lengths = np.random.default_rng(0).integers(1, 60, UNITS)
    (group,) = lockstep_batches([(index,) for index in drawn], 1, 32, lengths)
    expected = physical_batches(drawn, 32, lengths)
    assert all(map(np.array_equal, group.of(rank=0), expected))
    assert len(group.batches) == len(expected)


def test_fewer_rows_than_ranks_leave_some_without():
    (user, singles) = lockstep_batches([(4, 7), (1,)], ranks=3, size=2)
    assert [part.tolist() for part in user.batches[0]] == [[4], [7], []]
    assert [part.tolist() for part in singles.batches[0]] == [[1], [], []]


def test_nothing_drawn_is_nothing_to_do():
    assert lockstep_batches([], ranks=4, size=8) == []
    with pytest.raises(ValueError, match="ranks is 0"):
        lockstep_batches([], ranks=0, size=8)
    with pytest.raises(ValueError, match="physical batch size"):
        lockstep_batches([(1,)], ranks=2, size=0)
