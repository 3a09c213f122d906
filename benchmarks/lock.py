"""What checking the lock costs: `python -m benchmarks.lock` prints one table.

The immutable files of this project, and a data folder of 1 GB in four shards: read whole, as at the loop's start, for
`--autoresearch-lock=check` and before a keep; and by what the file system knows of it, as before every other run.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.machine import machine
from oracle.constants import CLIMBMIX
from oracle.corpus import file_digest
from oracle.prepared import MANIFEST, SCHEMA, Prepared, data_constants, data_folder, signed
from pytest_autoresearch.lock import Snapshot
from pytest_autoresearch.settings import immutable_patterns

ROOT = Path(__file__).parents[1]
ROUNDS, SHARDS, SHARD_BYTES = 7, 4, 2**28


def seconds(work: Callable[[], object]) -> list[float]:
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return taken


def data() -> Path:
    home = data_folder(CLIMBMIX)
    home.mkdir(parents=True)
    block = np.random.default_rng(0).bytes(2**24)
    files = {}
    for shard in range(SHARDS):
        path = home / f"train-{shard:05}.npy"
        with path.open("wb") as file:
            for _ in range(SHARD_BYTES // len(block)):
                file.write(block)
        files[path.name] = {"bytes": SHARD_BYTES, "sha256": file_digest(path)}
    manifest = signed({"schema": SCHEMA, "constants": data_constants(CLIMBMIX), "files": files})
    (home / MANIFEST).write_text(json.dumps(manifest))
    return home


def main() -> None:
    patterns = immutable_patterns(())
    snapshot = Snapshot.take(ROOT, patterns)
    marks = snapshot.marks(ROOT)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["AUTORESEARCH_CACHE"] = cache
        data()
        first = Prepared.open(CLIMBMIX)
        rows = {
            f"data, {SHARDS * SHARD_BYTES / 2**30:g} GB, read whole": seconds(lambda: Prepared.open(CLIMBMIX)),
            "data, the same, as seen before": seconds(lambda: Prepared.open(CLIMBMIX, first.identity)),
            f"{len(snapshot.entries)} files, compared": seconds(lambda: snapshot.touched(ROOT, marks)),
        }
    print(machine("numpy"))
    print(f"{'lock check':<32}{'median':>10}{'min':>10}{'max':>10}   ms, {ROUNDS} rounds, page cache warm")
    for name, taken in rows.items():
        print(f"{name:<32}" + "".join(f"{1000 * f(taken):>10.2f}" for f in (statistics.median, min, max)))


if __name__ == "__main__":
    main()
