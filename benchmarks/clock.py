"""Whether a compensated clock would spread less than the wall clock: both read from the same trainings of train.py.

    python -m benchmarks.clock FILE [RUNS]

Needs the prepared profile tiny. Trains RUNS times on a steady machine and RUNS times beside a process that takes a core
on and off at random, in turns; appends what it saw to FILE and prints a table of all that FILE holds, so that a series
may be measured in parts. A training takes 40 s.

About once a second, while the trainer waits for its batch, the judge's side times fixed kernels. A reference second is
the wall second times (a kernel's usual time / its time now); the usual time is the median of the first probes of all
steady runs. What is read from a run is how many steps it had made after 20 seconds of either clock, probing left out.

The kernels, about 10 ms each: arithmetic in the cache on one core; the same on every core at once, which a process that
holds one core slows down as it slows down a training whose threads wait for each other; copies through memory; and a
small training step in torch, which has all three and the trainer's own threads. One clock has no kernel: it
leaves out the share of the processors that other processes had (/proc/stat, what the hypervisor took included).
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.machine import machine
from oracle._processes import Crash, adopt_orphans
from oracle.constants import TINY
from oracle.prepared import Prepared
from oracle.training import Training, _Feed

ROOT = Path(__file__).parents[1]
SECONDS = 20.0  # of either clock
TRAIN_S = 34.0  # of wall clock, so that a slow run reaches SECONDS of the compensated one
PROBE_EVERY_S = 1.0
RUNS = 20
CORES = os.cpu_count() or 1
OTHERS = "others' share"  # the clock without a kernel

# a process of its own: a core on and off, each for half a second to five, until `seconds` are over
LOAD = """
import random, sys, time
chance, end = random.Random(int(sys.argv[1])), time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    rest = time.monotonic() + chance.uniform(0.5, 5)
    while time.monotonic() < min(rest, end): pass
    time.sleep(chance.uniform(0.5, 5))
"""


def kernels() -> dict[str, Callable[[], object]]:
    """Return the kernels by name."""
    import torch
    import torch.nn.functional as F

    # products this small stay on one thread of the BLAS library and in the cache, and run without Python's lock
    stack = np.random.default_rng(0).random((16, 64, 64), dtype=np.float32)
    ones = np.ones((64, 64), dtype=np.float32)
    results = [np.empty_like(stack) for _ in range(CORES)]
    pool = ThreadPoolExecutor(CORES)
    source, target = np.ones(2**24, dtype=np.uint8), np.empty(2**24, dtype=np.uint8)
    torch.manual_seed(0)
    weights = [torch.randn(shape).mul_(0.1).requires_grad_() for shape in ((512, 128), (128, 512), (1024, 128))]
    x, y = torch.randn(400, 128), torch.arange(400)

    def products(result: np.ndarray) -> None:
        for _ in range(150):
            np.matmul(stack, ones, out=result)

    def copies() -> None:
        for _ in range(4):
            np.copyto(target, source)

    def step() -> None:
        first, second, head = weights
        hidden = F.linear(F.relu(F.linear(x, first)).square(), second)
        F.cross_entropy(F.linear(hidden, head), y).backward()  # type: ignore[no-untyped-call]

    return {
        "one core": lambda: products(results[0]),
        "every core": lambda: list(pool.map(products, results)),
        "memory": copies,
        "torch step": step,
    }


def others_s(tree: psutil.Process) -> float:
    """Return the processor seconds since the start of the machine that were not this tree's."""
    times = psutil.cpu_times()
    busy = sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
    mine = [process.cpu_times() for process in (tree, *tree.children(recursive=True))]
    return float(busy - sum(time.user + time.system for time in mine))


class ProbingFeed(_Feed):
    """Feeds a trainer, and writes down about every second how far it is and what a probe costs now."""

    def __init__(self, prepared: Prepared, budget_s: float, ring: int) -> None:
        super().__init__(prepared, budget_s, ring)
        self.marks: list[dict[str, Any]] = []
        self._kernels = kernels()
        self._tree = psutil.Process()
        self._probing_s = 0.0
        for kernel in self._kernels.values():
            kernel()

    def next(self) -> dict[str, Any]:
        trained = self.tokens  # of the batches so far; the next one is only handed out here
        reply = super().next()
        wall_s = self.budget.elapsed_s - self._probing_s
        if not self.marks or wall_s - self.marks[-1]["wall_s"] >= PROBE_EVERY_S:
            mark = {"wall_s": wall_s, "steps": self.steps, "tokens": trained, OTHERS: others_s(self._tree)}
            self.marks.append(mark | {name: seconds(kernel) for name, kernel in self._kernels.items()})
            self._probing_s = self.budget.elapsed_s - wall_s
        return reply


class Silent:
    """Hears of progress and keeps it to itself."""

    def send(self, event: str, **fields: Any) -> None:
        pass

    def progress(self, **fields: Any) -> None:
        pass


def seconds(kernel: Callable[[], object]) -> float:
    began = time.perf_counter()
    kernel()
    return time.perf_counter() - began


def train(seed: int) -> list[dict[str, Any]]:
    """Train once, in a process of its own; return the marks."""
    adopt_orphans()
    prepared = Prepared.open(TINY)
    os.environ["AUTORESEARCH_PROFILE"] = TINY.name
    with tempfile.TemporaryDirectory() as name:
        candidate, scratch = Path(name, "candidate"), Path(name, "scratch")
        for folder in (candidate, scratch):
            folder.mkdir()
        (candidate / "train.py").write_bytes((ROOT / "train.py").read_bytes())
        request = {"candidate": str(candidate), "scratch": str(scratch), "budget_s": TRAIN_S, "seed": seed}
        with Training(request, prepared, Silent()) as training:
            feed = ProbingFeed(prepared, TRAIN_S, training._ring)
            training._feed = feed
            try:
                training.finish()
            except Crash as crash:
                raise SystemExit(f"error: {crash}") from None
    return feed.marks


def measure(seed: int, loaded: bool) -> dict[str, Any]:
    """Train once beside a load or beside none."""
    load = subprocess.Popen([sys.executable, "-c", LOAD, str(seed), str(3 * TRAIN_S)]) if loaded else None
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as one:
            return {"loaded": loaded, "seed": seed, "marks": one.submit(train, seed).result()}
    finally:
        if load is not None:
            load.kill()
            load.wait()


def clocks(marks: Sequence[dict[str, Any]], usual: dict[str, float]) -> dict[str, np.ndarray]:
    """Return what each clock showed at each mark; a kernel's by the mean or the median of the probes around it."""
    wall = np.array([mark["wall_s"] for mark in marks])
    shown = {"wall clock": wall}
    for name, usually in usual.items():
        times = np.array([mark[name] for mark in marks])
        smooth = np.array([np.median(times[max(0, i - 2) : i + 1]) for i in range(len(times))])
        for title, cost in ((name, (times[:-1] + times[1:]) / 2), (f"{name}, median of 3", smooth[1:])):
            shown[title] = np.append(0.0, np.cumsum(np.diff(wall) * usually / cost))
    share = np.diff([mark[OTHERS] for mark in marks]) / CORES
    shown[OTHERS] = np.append(0.0, np.cumsum(np.diff(wall) - share))
    return shown


def steps_by_clock(run: dict[str, Any], usual: dict[str, float]) -> dict[str, float]:
    """Return the steps after SECONDS of each clock; a run that ended before goes on at its mean speed."""
    marks = run["marks"]
    steps = np.array([mark["tokens"] for mark in marks]) * marks[-1]["steps"] / marks[-1]["tokens"]
    return {
        name: float(np.interp(SECONDS, shown, steps) if shown[-1] >= SECONDS else steps[-1] * SECONDS / shown[-1])
        for name, shown in clocks(marks, usual).items()
    }


def prediction(runs: Sequence[dict[str, Any]], name: str) -> tuple[float, float]:
    """Return correlation and slope of log(tokens a second) on log(1 / probe), over all marks of all runs."""
    pace, speed = [], []
    for marks in (run["marks"] for run in runs):
        for before, after in pairwise(marks):
            pace.append(np.log((after["tokens"] - before["tokens"]) / (after["wall_s"] - before["wall_s"])))
            speed.append(-np.log((before[name] + after[name]) / 2))
    return statistics.correlation(speed, pace), statistics.linear_regression(speed, pace).slope


def cells(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{'-':>10}{'-':>9}"
    mean, sd = statistics.fmean(values), statistics.stdev(values)
    return f"{mean:>10.1f}{100 * sd / mean:>9.2f}"


def main() -> None:
    file, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else RUNS
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")  # as the judge does
    for _ in range(count):
        for loaded in (False, True):
            run = measure(random.randrange(2**31), loaded)
            with file.open("a") as lines:
                print(json.dumps(run), file=lines)
    runs = [json.loads(line) for line in file.read_text().splitlines()]
    steady, changing = ([run for run in runs if run["loaded"] is which] for which in (False, True))
    names = [name for name in steady[0]["marks"][0] if name not in ("wall_s", "steps", "tokens", OTHERS)]
    usual = {name: statistics.median(run["marks"][0][name] for run in steady) for name in names}
    print(machine("torch", "numpy"))
    print(f"steps after {SECONDS:g} s of each clock: mean, and standard deviation in % of it")
    print(f"{'':<26}{f'steady, {len(steady)} runs':>19}{f'changing, {len(changing)} runs':>22}{'all':>12}")
    rows = [(run["loaded"], steps_by_clock(run, usual)) for run in runs]
    for name in rows[0][1]:
        parts = [[by[name] for was, by in rows if was in which] for which in ((False,), (True,), (False, True))]
        print(f"{name:<26}" + "  ".join(map(cells, parts)))
    for name in names:
        r, slope = prediction(runs, name)
        print(f"{name}: usually {1000 * usual[name]:.1f} ms; predicts the pace with r = {r:.2f}, slope {slope:.2f}")


if __name__ == "__main__":
    main()
