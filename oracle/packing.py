"""Best-fit packing of documents into rows of one length, without padding.

The rule: before every choice the buffer is refilled, one document at a time. The longest document that fits into
what is left of the row is placed; if none fits, the shortest is cropped to fill the row and its tail is lost. Among
equally long documents the oldest comes first. When the documents end, the buffer shrinks; an incomplete last row is
dropped.
"""

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from oracle.constants import BUFFER_DOCUMENTS

Tokens = npt.NDArray[np.uint16]


def pack(
    documents: Iterable[Tokens | Sequence[int]], row_len: int, buffer_size: int = BUFFER_DOCUMENTS
) -> Iterator[Tokens]:
    """Yield rows of exactly `row_len` tokens [row_len], each a fresh array, from documents that begin with BOS.

    Raises ValueError for an empty document, which could never fill a row, and for a length or buffer below one.
    """
    if row_len < 1 or buffer_size < 1:
        raise ValueError(f"row_len and buffer_size must be at least 1, not {row_len} and {buffer_size}")
    incoming = iter(documents)
    # One queue per length keeps arrival order; bit n of `lengths` says that queue n holds something, so the longest
    # that fits and the shortest of all are the highest and lowest set bits of one integer.
    queues: defaultdict[int, deque[Tokens | Sequence[int]]] = defaultdict(deque)
    lengths = 0
    longer: list[tuple[int, int, Tokens | Sequence[int]]] = []  # heap of what exceeds a row: (length, arrival)
    arrivals = 0
    held = 0
    open_ended = True

    while True:
        row = np.empty(row_len, dtype=np.uint16)
        at = 0
        while at < row_len:
            while open_ended and held < buffer_size:
                document = next(incoming, None)
                if document is None:
                    open_ended = False
                    break
                length = len(document)
                held += 1
                if length > row_len:
                    arrivals += 1
                    heapq.heappush(longer, (length, arrivals, document))
                    continue
                if not length:
                    raise ValueError("a document without tokens cannot be packed: put BOS in front of it")
                queues[length].append(document)
                lengths |= 1 << length
            if not held:
                return
            held -= 1
            room = row_len - at
            length = lengths.bit_length() - 1
            if length > room:
                length = (lengths & ((2 << room) - 1)).bit_length() - 1  # bits 0..room
            if length < 0:  # none fits
                if not lengths:
                    row[at:] = heapq.heappop(longer)[2][:room]
                    break
                length = (lengths & -lengths).bit_length() - 1
            queue = queues[length]
            document = queue.popleft()
            if not queue:
                lengths ^= 1 << length
            if length > room:
                row[at:] = document[:room]
                break
            row[at : at + length] = document
            at += length
        yield row
