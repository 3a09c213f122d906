"""From prepared token shards to rows and batches, without end.

The rows depend on the shards and the row length alone, never on a batch size.
"""

import threading
from collections.abc import Generator, Iterator
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from oracle.corpus import DataError
from oracle.packing import Tokens, pack
from oracle.prepared import Prepared

_BATCHES_AHEAD = 4  # held ready by the background thread
_BLOCK = 1 << 20  # tokens searched for BOS at a time


def train_rows(prepared: Prepared, seq_len: int) -> Iterator[tuple[Tokens, int]]:
    """Yield training rows (uint16 [seq_len + 1], epoch), pass after pass over the shards in the same order.

    The epoch counts from 0 and is that of the newest document read when the row was completed, so it never falls.
    Raises DataError when the shards hold no document.
    """
    shards = prepared.train_shards()
    epoch = 0

    def documents() -> Iterator[Tokens]:
        nonlocal epoch
        while True:
            found = False
            for shard in shards:
                for document in _documents(np.asarray(shard), prepared.bos_id):
                    found = True
                    yield document
            if not found:
                raise DataError(f"{prepared.home} holds no training document: run `{prepared.command}` again")
            epoch += 1

    for row in pack(documents(), seq_len + 1):
        yield row, epoch


def _documents(shard: Tokens, bos_id: int) -> Iterator[Tokens]:
    """Yield views of a shard's documents, each with BOS in front; a mapped shard is read no further than asked for."""
    start: int | None = None
    for block in range(0, len(shard), _BLOCK):
        for at in (np.flatnonzero(shard[block : block + _BLOCK] == bos_id) + block).tolist():
            if start is not None:
                yield shard[start:at]
            start = at
    if start is not None:
        yield shard[start:]


def train_batches(
    prepared: Prepared, batch_size: int, seq_len: int
) -> Generator[tuple[npt.NDArray[np.uint16], int], None, None]:
    """Yield batches (uint16 [batch_size, seq_len + 1], epoch of the last row), prepared ahead by one thread.

    Each batch is a fresh array that nothing writes to again. Closing the iterator ends the thread.
    """
    ready: SimpleQueue[tuple[npt.NDArray[np.uint16], int] | BaseException] = SimpleQueue()
    free = threading.Semaphore(_BATCHES_AHEAD)
    closed = threading.Event()

    def produce() -> None:
        try:
            rows = train_rows(prepared, seq_len)
            while free.acquire() and not closed.is_set():
                batch = np.empty((batch_size, seq_len + 1), dtype=np.uint16)
                for index in range(batch_size):
                    if closed.is_set():
                        return
                    batch[index], epoch = next(rows)
                ready.put((batch, epoch))
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=produce, name="train-batches", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            free.release()
            yield item
    finally:
        closed.set()
        free.release()
        thread.join()
