"""What the idle plugin costs pytest's start-up: `python -m benchmarks.startup` prints one table.

Runs `pytest` on an empty test file with the plugin and with `-p no:autoresearch` in turns, no other plugin loaded, and
compares CPU seconds of the child, which a busy machine disturbs less than wall time.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import machine

ROUNDS = 30
VARIANTS = {
    "with the plugin, idle": ["-p", "pytest_autoresearch.plugin"],
    "without it": [],
}


def cpu_seconds(arguments: list[str], folder: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", *arguments, "test_nothing.py"]
    subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "test_nothing.py").write_text("def test_nothing(): pass\n")
        times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for _ in range(ROUNDS):
            for variant, arguments in VARIANTS.items():
                times[variant].append(cpu_seconds(arguments, folder))
    print(machine("pytest"))
    print(f"{'pytest on one empty test':<26}{'median':>9}{'min':>9}{'sd':>9}   CPU ms, {ROUNDS} rounds in turns")
    for variant, values in times.items():
        row = (statistics.median(values), min(values), statistics.stdev(values))
        print(f"{variant:<26}" + "".join(f"{1000 * value:>9.1f}" for value in row))
    with_it, without = (statistics.median(times[variant]) for variant in VARIANTS)
    print(f"ratio of medians {with_it / without:.3f}")


if __name__ == "__main__":
    main()
