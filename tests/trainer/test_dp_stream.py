"""The secret stream: the cipher's published numbers, and the same normal numbers everywhere."""

import math

import pytest
import torch
from scipy import stats

from dpmoe_trainer.dp import kernels
from dpmoe_trainer.dp.stream import GROUP, add_normal, chacha20, normal_groups

CPU = torch.device("cpu")
KEY = bytes(range(32))


@pytest.fixture(params=["compiled", "torch"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(kernels, "library", lambda: None)
    return request.param


def normal(count: int, scale: float = 1.0, key: bytes = KEY, dtype=torch.float64) -> torch.Tensor:
    numbers = torch.zeros(count, dtype=dtype)
    add_normal(numbers, key, scale)
    return numbers


def key_stream(key: bytes, first: int, blocks: int) -> bytes:
    words = chacha20(key, first, blocks, CPU)
    return words.T.contiguous().numpy().astype("<u4").tobytes()


@pytest.mark.parametrize(
    ("key", "first", "begins"),
    [
        # RFC 8439, appendix A.1, vectors 1, 2 and 3: the nonce, which a counter of 64 bits
        # partly takes the place of, is zero in all of them.
        (bytes(32), 0, "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"),
        (bytes(32), 1, "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"),
        (bytes(31) + b"\1", 1, "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"),
    ],
)
def test_the_cipher_gives_the_published_blocks(key: bytes, first: int, begins: str) -> None:
    assert key_stream(key, first, 1)[:32].hex() == begins


def test_the_counter_has_sixty_four_bits() -> None:
    across = key_stream(KEY, 2**32 - 1, 2)
    assert across == key_stream(KEY, 2**32 - 1, 1) + key_stream(KEY, 2**32, 1)
    assert across[64:] != key_stream(KEY, 0, 1)


@pytest.mark.parametrize("count", [1, GROUP - 1, GROUP, 3 * GROUP + 17, 300 * GROUP])
def test_the_kernel_and_torch_give_the_same_numbers(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernels.library() is not None, "these tests need a C++ compiler"
    compiled = normal(count)
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert torch.allclose(compiled, normal(count), rtol=0, atol=1e-13)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        numbers = normal(1000)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(numbers, normal(1000))


def test_any_part_can_be_computed_alone() -> None:
    whole = normal_groups(KEY, 0, 300, CPU)
    assert torch.equal(whole[256 * GROUP :], normal_groups(KEY, 256, 44, CPU))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [0, 1, GROUP - 1, GROUP, 5 * GROUP + 77, 256 * GROUP + 3])
@pytest.mark.parametrize("count", [0, 1, 50, GROUP, 300 * GROUP + 1])
def test_a_part_that_begins_anywhere_gets_the_same_bits(
    first: int, count: int, dtype: torch.dtype, either: str
) -> None:
    whole = torch.ones(first + count, dtype=dtype)
    add_normal(whole, KEY, 0.7)
    part = torch.ones(count, dtype=dtype)
    add_normal(part, KEY, 0.7, first)
    assert torch.equal(part, whole[first:])


def test_numbers_are_normal_in_the_middle_and_in_the_tails(either: str) -> None:
    numbers = normal(200_000)
    assert stats.kstest(numbers.numpy(), "norm").pvalue > 0.01
    for bound in (2.0, 3.0, 4.0):
        expected = len(numbers) * math.erfc(bound / math.sqrt(2))
        assert abs(float(numbers.abs().gt(bound).sum()) - expected) < 5 * math.sqrt(expected)
    assert numbers.unique().numel() == len(numbers)
    # Neighbours in the order of memory, of a pair of Box and Muller's, and of the lanes.
    for distance in (1, GROUP // 2, 16, GROUP):
        for values in (numbers, numbers.pow(2)):
            pair = torch.stack([values[distance:], values[:-distance]])
            assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / math.sqrt(len(numbers))


def test_it_is_added_with_its_scale_and_rounded_once(either: str) -> None:
    begun = torch.randn(500, generator=torch.Generator().manual_seed(0))
    numbers = begun.clone()
    add_normal(numbers, KEY, 0.3)
    assert torch.equal(numbers, (begun.double() + normal(500, 0.3)).float())


def test_half_precision_takes_noise_too() -> None:
    numbers = normal(300, dtype=torch.bfloat16)
    assert torch.equal(numbers, normal(300).bfloat16())


def test_another_key_gives_another_stream(either: str) -> None:
    one, other = normal(20_000), normal(20_000, key=KEY[::-1])
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 5 / math.sqrt(20_000)
