"""The definition of best-fit packing, written to be read: what `oracle.packing.pack` must equal row for row."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from oracle.packing import Tokens

Choose = Callable[[Sequence[int], int], int]


def best_fit(lengths: Sequence[int], room: int) -> int:
    """Return the index of the longest document that fits, else of the shortest; the first of equals."""
    fitting = [length for length in lengths if length <= room]
    return lengths.index(max(fitting) if fitting else min(lengths))


def naive_pack(
    documents: Iterable[Tokens], row_len: int, buffer_size: int, choose: Choose = best_fit
) -> Iterator[Tokens]:
    """Fill rows from a buffer that is refilled before every choice."""
    incoming = iter(documents)
    buffer: list[Tokens] = []
    row: list[Tokens] = []
    room = row_len
    while True:
        buffer += islice(incoming, buffer_size - len(buffer))
        if not buffer:
            return
        document = buffer.pop(choose([len(held) for held in buffer], room))
        row.append(document[:room])
        room -= len(row[-1])
        if not room:
            yield np.concatenate(row)
            row, room = [], row_len
