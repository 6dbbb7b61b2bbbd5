"""What one rank of a pod reads, for all ranks of the pod.

The text lies in scratch files that all of them map. The numbers beside it, labels, sizes and units,
go over memory that has no name either. Both are as private as the rows, so ranks tell each other no
more than where in their pod they are.
"""

import os
import pickle
import time
from collections.abc import Callable
from typing import TypeVar

from dpmoe_trainer.data.scratch import OpenFile
from dpmoe_trainer.errors import Refusal
from dpmoe_trainer.parallel.collectives import tell_all
from dpmoe_trainer.parallel.ranks import Ranks
from dpmoe_trainer.peers import Peers

Beat = Callable[[], None]
T = TypeVar("T")

WORD_SECONDS = 1.0
"""How often ranks that read tell the others that they still do."""


def read_once(read: Callable[[Beat], T], ranks: Ranks, beat: Beat = lambda: None) -> T:
    """What `read` returns on the first rank of each pod, on all ranks of the pod.

    All ranks call this together. Those that wait do so as long as those that read make progress.

    Args:
        read: reads tables, and calls what it is given at every sign of progress.
        ranks: the ranks.
        beat: this rank's own sign of progress.

    Raises:
        Refusal: by `read`, on any rank; on all ranks.
        PeerLost: another rank is gone or silent.
    """
    if ranks.alone:
        return read(beat)
    value: T | None = None
    problem: Refusal | None = None
    if ranks.local_rank == 0:
        try:
            value = read(_heard_by(ranks.peers, beat))
        except Refusal as error:
            problem = error
    while ranks.peers.any_of(False):
        beat()
    with open(os.memfd_create("dpmoe-numbers"), "w+b") as memory:
        if ranks.local_ranks > 1 and value is not None:
            pickle.dump(value, memory, protocol=pickle.HIGHEST_PROTOCOL)
            memory.flush()
        words = tell_all((problem, OpenFile.of(memory)))
        problem = next((found for found, _ in words if found is not None), None)
        if problem is not None:
            raise problem
        if value is None:
            _, told = words[ranks.first_here]
            with told.open() as file:
                value = pickle.load(file)
        ranks.peers.any_of(False)  # the memory must stay until all have read it
    assert value is not None, "it was read here, or for this rank"
    return value


def _heard_by(peers: Peers, beat: Beat) -> Beat:
    """A sign of progress that the ranks that wait hear too, every now and then."""
    told = time.monotonic()

    def beat_for_all() -> None:
        nonlocal told
        beat()
        if time.monotonic() - told >= WORD_SECONDS:
            peers.any_of(True)
            told = time.monotonic()

    return beat_for_all
