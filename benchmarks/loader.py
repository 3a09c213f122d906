"""The loader, from token shards to tensors on the device: `python -m benchmarks.loader [SECONDS]`.

Reads the prepared data of the active profile (AUTORESEARCH_PROFILE); where there is none, shards of 50 M made-up tokens
with log-normal document lengths. Each stage includes those above it; the last two run against a judge's feed in another
process, as in an experiment. All stages are repeated in turns within SECONDS (30). The wait is what one
`next()` takes when the batches before it are in use for a while, as in training.
"""

import os
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from benchmarks.machine import machine
from oracle._wire import RING_BYTES, Channel, shared_memory
from oracle.constants import BUFFER_DOCUMENTS, CLIMBMIX
from oracle.corpus import DataError
from oracle.dataloader import train_batches, train_rows
from oracle.packing import Tokens
from oracle.prepared import Prepared, active_profile
from oracle.training import _Feed
from tests.laws.packing_reference import naive_pack

ROWS = 128  # a batch
REPEATS = 5
SHARD_TOKENS = 25_000_000
NAIVE_ROWS = 200
IN_USE_S = 0.02
GOAL = 10.0  # Mtok/s


def made_up(home: Path) -> Prepared:
    """Write two shards for profile climbmix: a median of 700 tokens a document."""
    prepared = Prepared(profile=CLIMBMIX, home=home, manifest={"files": {}})
    for index in range(2):
        draw = np.random.default_rng(index)
        shard = draw.integers(0, prepared.bos_id, SHARD_TOKENS, dtype=np.uint16)
        lengths = np.exp(draw.normal(np.log(700), 1.0, SHARD_TOKENS // 700)).astype(np.int64) + 2
        starts = np.cumsum(lengths) - lengths
        shard[starts[starts < SHARD_TOKENS]] = prepared.bos_id
        np.save(home / f"train-{index:05}.npy", shard)
        prepared.manifest["files"][f"train-{index:05}.npy"] = {}
    return prepared


@contextmanager
def judge(prepared: Prepared) -> Iterator[tuple[Channel, int]]:
    """Serve batches from another process; yield the trainer's end of the channel and the ring."""
    ours, theirs = socket.socketpair()
    ring = shared_memory(RING_BYTES)
    child = os.fork()
    if not child:
        try:
            ours.close()
            feed, channel = _Feed(prepared, 1e9, ring), Channel(theirs)
            while message := channel.receive():
                if message["op"] == "batches":
                    feed.open(message["rows"], message["seq_len"])
                else:
                    channel.send(**feed.next())
        finally:
            os._exit(0)
    theirs.close()
    try:
        yield Channel(ours), ring
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def naive_rate(prepared: Prepared) -> float:
    """Return the naive packer's Mtok/s on the first rows; end the program where the loader's rows are others."""
    row_len = prepared.profile.seq_len + 1
    head = np.asarray(prepared.train_shards()[0][: 4 * (NAIVE_ROWS + BUFFER_DOCUMENTS) * row_len])
    starts = [*np.flatnonzero(head == prepared.bos_id).tolist(), len(head)]
    documents: list[Tokens] = [head[start:end] for start, end in pairwise(starts)]
    began = time.perf_counter()
    naive = list(islice(naive_pack(documents, row_len, BUFFER_DOCUMENTS), NAIVE_ROWS))
    seconds = time.perf_counter() - began
    if not np.array_equal(naive, [row for row, _ in islice(train_rows(prepared, row_len - 1), NAIVE_ROWS)]):
        sys.exit("error: the loader's rows are not those of the naive definition")
    return NAIVE_ROWS * (row_len - 1) / seconds / 1e6


def rate(take: Callable[[], int], seconds: float) -> float:
    """Return Mtok/s of calling `take`, which says how many tokens it took."""
    began = time.perf_counter()
    tokens = 0
    while (taken := time.perf_counter() - began) < seconds:
        tokens += take()
    return tokens / taken / 1e6


def measure(prepared: Prepared, channel: Channel, ring: int, seconds: float) -> None:
    """Print the table."""
    import torch

    from oracle.run import Run, pick_device
    from oracle.trainer import JudgeSource

    profile, seq_len, device = prepared.profile, prepared.profile.seq_len, pick_device()
    naive = naive_rate(prepared)
    source = JudgeSource(channel, ring)
    run = Run(profile=profile, device=device, seed=0, budget_s=1e9, bos_id=prepared.bos_id, source=source)
    rows = train_rows(prepared, seq_len)
    batches = train_batches(prepared, ROWS, seq_len)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def from_rows() -> int:
        return sum(seq_len for _ in islice(rows, ROWS))

    def from_thread() -> int:
        next(batches)
        return ROWS * seq_len

    def from_judge() -> int:
        assert source.next() is not None
        return ROWS * seq_len

    def on_device() -> int:
        next(tensors)
        synchronize()
        return ROWS * seq_len

    began = time.perf_counter()
    tensors = run.batches(ROWS)
    on_device()
    first_s = time.perf_counter() - began
    stages = {
        "rows": from_rows,
        "batches, by a thread": from_thread,
        "from the judge": from_judge,
        f"tensors on {device.type}": on_device,
    }
    rates: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(REPEATS):
        for name, take in stages.items():
            take()
            rates[name].append(rate(take, seconds / len(stages) / (REPEATS + 1)))
    waits = []
    for _ in range(50):
        time.sleep(IN_USE_S)
        began = time.perf_counter()
        next(tensors)
        waits.append(1e3 * (time.perf_counter() - began))
        synchronize()
    batches.close()

    print(f"{machine('numpy', 'torch')}; device {torch.cuda.get_device_name() if device.type == 'cuda' else device}")
    shards = prepared.train_shards()
    print(f"{len(shards)} shards, {sum(map(len, shards)) / 1e6:,.1f} M tokens; batches of {ROWS} x {seq_len}")
    print(f"{'shards to':<24}{'Mtok/s':>9}{'sd':>7}{'/ naive':>9}   {REPEATS} repeats in turns")
    print(f"{'rows, naive definition':<24}{naive:>9.2f}{'':>7}{1:>9.1f}   the same {NAIVE_ROWS} rows")
    for name, values in rates.items():
        mean = statistics.mean(values)
        print(f"{name:<24}{mean:>9.1f}{statistics.stdev(values):>7.1f}{mean / naive:>9.1f}")
    print(f"first batch on the device after {1e3 * first_s:.0f} ms")
    print(f"wait for a batch: median {statistics.median(waits):.2f} ms, worst {max(waits):.2f} ms of {len(waits)}")
    print(f"goal of {GOAL:g} Mtok/s: {'reached' if mean >= GOAL else 'MISSED'}")


def main() -> None:
    """Measure on prepared data, or on made-up data in a folder that goes afterwards."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 30.0
    with tempfile.TemporaryDirectory() as folder:
        try:
            prepared = Prepared.open(active_profile())
        except DataError as error:
            print(f"made-up shards: {error}")
            prepared = made_up(Path(folder))
        with judge(prepared) as (channel, ring):
            measure(prepared, channel, ring, seconds)


if __name__ == "__main__":
    main()
