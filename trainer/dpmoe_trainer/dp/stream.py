"""A secret stream of normal numbers: ChaCha20, then Box and Muller.

ChaCha20 (RFC 8439) is a cipher's key stream: nothing follows from numbers that were seen about
others, and any part can be computed without those before it. Each stream has a key of its own, so
the block counter takes the place of the nonce too.

`dpmoe_trainer.dp.kernels` computes it on a processor, at the price of torch's own, predictable
normal numbers. What is here gives the same numbers, to the last bits, where there are no kernels.

Shapes: G groups of 128 numbers, from 16 blocks (lanes) each; their order is in kernels/noise.cpp.
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from dpmoe_trainer.dp import kernels

_LANES, _PAIRS = 16, 4
GROUP = 2 * _PAIRS * _LANES
"""Numbers that are computed together."""

_GROUPS_AT_ONCE = {"cpu": 1 << 8, "cuda": 1 << 15}
"""What fits a core's cache, and what keeps a GPU busy."""


def add_normal(numbers: Tensor, key: bytes, scale: float, first: int = 0) -> None:
    """Adds `scale` times the normal numbers of a key's stream, in place.

    The numbers are of double precision, from 53 random bits each, and rounded once, after they were
    added.

    Args:
        numbers: Contiguous.
        key: The stream's 32 bytes; never used for another stream.
        scale: The standard deviation.
        first: Which of the stream's numbers is added to the first, where these are but a part.
    """
    if not numbers.numel():
        return
    if kernels.usable(numbers):
        kernels.add_normal(numbers, key, scale, first)
        return
    flat = numbers.view(-1)
    groups = _GROUPS_AT_ONCE.get(flat.device.type, _GROUPS_AT_ONCE["cpu"])
    for part in flat.split(groups * GROUP):
        group, skipped = divmod(first, GROUP)
        needed = math.ceil((skipped + len(part)) / GROUP)
        normal = normal_groups(key, group, needed, flat.device)[skipped:]
        part.copy_(part.double() + scale * normal[: len(part)])
        first += len(part)


def normal_groups(key: bytes, first: int, groups: int, device: torch.device) -> Tensor:
    """The normal numbers of some groups of a key's stream.

    Returns:
        [G·128] float64.
    """
    words = chacha20(key, first * _LANES, groups * _LANES, device).view(-1, 2, groups, _LANES)
    bits = (words[:, 1].long() << 32) | (words[:, 0].long() & 0xFFFFFFFF)
    uniform_PGL = ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53
    # Half a grid step up: the logarithm of zero is none of the normal's values.
    radius_PGL = (-2 * (uniform_PGL[:_PAIRS] + 2.0**-54).log()).sqrt()
    angle_PGL = 2 * math.pi * uniform_PGL[_PAIRS:]
    pairs = torch.cat([radius_PGL * angle_PGL.cos(), radius_PGL * angle_PGL.sin()])
    return pairs.transpose(0, 1).flatten()


def chacha20(key: bytes, first: int, blocks: int, device: torch.device) -> Tensor:
    """Blocks of the ChaCha20 key stream.

    Args:
        key: 32 bytes.
        first: The first block's number, which stands in the words 12 and 13.
        blocks: How many.
        device: Where to compute.

    Returns:
        [16, blocks] words, as int32 with the bits of the unsigned word.
    """
    fixed = torch.tensor(struct.unpack("<4i8i", b"expand 32-byte k" + key), dtype=torch.int32)
    number = torch.arange(first, first + blocks, device=device)
    begin = torch.zeros(16, blocks, dtype=torch.int32, device=device)
    begin[:12] = fixed.to(device)[:, None]
    begin[12], begin[13] = number.int(), (number >> 32).int()
    rows = [row.clone() for row in begin.split(4)]
    for _ in range(10):
        _quarter_rounds(rows)  # Of the columns,
        _turn(rows, -1)
        _quarter_rounds(rows)  # and of the diagonals.
        _turn(rows, 1)
    return begin.add_(torch.cat(rows))


def _quarter_rounds(rows: list[Tensor]) -> None:
    """Four at once, one in each column of the four rows."""
    a, b, c, d = rows
    for into, other, mixed, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        into += other
        mixed ^= into
        # A shift to the right copies the sign, so what it brings in is cut off.
        low = (mixed >> (32 - bits)).bitwise_and_((1 << bits) - 1)
        mixed.bitwise_left_shift_(bits).bitwise_or_(low)


def _turn(rows: list[Tensor], by: int) -> None:
    """Turns the second row by one place, the third by two, the fourth by three."""
    for index in (1, 2, 3):
        rows[index] = rows[index].roll(by * index, 0)
