"""What an experiment is on a GPU: start-up, throughput, steps, memory, score and judging, old train.py beside new.

    python -m benchmarks.gpu [RUN ...]

A RUN is `old` or `new` (benchmarks/starting_point.py, train.py), then words after colons: a budget in seconds (60),
`seed=N`, `memory=GB` (a limit for each process, as on a smaller card) and constants of train.py as NAME=VALUE, such as
`new:300` or `new:60:TOTAL_BATCH_SIZE=524288`. By default `new old new:seed=1 old:seed=1`. Each run is judged as the
plugin does it, in the profile in use, sealed where that works; the first of each finds no compile cache (cold),
the others one that the first left (warm). Last comes each run's curve as JSON, one line a run, and with
`--plot=FILE.svg` (needs matplotlib) a picture of them. `beyond` is what a run takes beyond its training, and `an hour`
how many runs of 300 s that makes.
"""

import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.judging import judge
from benchmarks.machine import machine
from oracle.prepared import Prepared, active_profile

ROOT = Path(__file__).parents[1]
SOURCES = {"old": ROOT / "benchmarks/starting_point.py", "new": ROOT / "train.py"}
HEAD = f"{'run':<44}" + "".join(
    f"{name:>9}"
    for name in (
        *("start s", "Mtok/s", "steps", "step ms", "p95", "GB", "mfu %", "val_bpb"),
        *("score s", "audit s", "beyond s", "an hour"),
    )
)


def with_constants(source: str, constants: dict[str, str]) -> str:
    """Return train.py with module constants set; SystemExit for one that it lacks."""
    for name, value in constants.items():
        source, found = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value}  ", source, count=1, flags=re.MULTILINE)
        if not found:
            sys.exit(f"error: train.py has no constant {name}")
    return source


def judge_run(word: str, folder: Path) -> dict[str, Any]:
    """Judge one RUN; return its figures and its curve."""
    which, *options = word.split(":")
    if which not in SOURCES:
        sys.exit(f"error: a run is {word!r}, begin it with {' or '.join(SOURCES)}")
    budget = next((float(option) for option in options if "=" not in option), 60.0)
    constants = dict(option.split("=", 1) for option in options if "=" in option)
    seed, memory = int(constants.pop("seed", 0)), constants.pop("memory", None)
    source = with_constants(SOURCES[which].read_text(), constants)
    cache = folder / f"compiled-{which}"
    cold = not cache.exists()
    run = judge(
        folder,
        source,
        env={"AUTORESEARCH_MEMORY_GB": memory} if memory else None,
        profile=None,
        budget_s=budget,
        seed=seed,
        compiled={"path": str(cache), "keep": cold},
    )
    event = run.result
    if event.get("status") != "ok":
        print(run.log[-3000:])
        return {"run": word, "failed": f"{event.get('kind', event.get('status'))}: {event.get('reason')}"}
    metrics = event["metrics"]
    rates = [float(rate) * 1e3 for rate in re.findall(r"\| ([\d.]+)k tokens/s", run.log)]
    tokens = metrics["total_tokens_M"] * 1e6 / metrics["num_steps"]
    times = sorted(1e3 * tokens / rate for rate in rates[1:] if rate) or [0.0]
    return {
        "run": word,
        "cold": cold,
        "start": run.at["train"],
        "rate": metrics["total_tokens_M"] / metrics["training_seconds"],
        "beyond": run.total_s - metrics["training_seconds"],
        "step_ms": statistics.median(times),
        "p95": times[int(0.95 * (len(times) - 1))],
        "curve": [(round(e["elapsed_s"], 2), round(e["loss"], 4)) for e in run.events if "loss" in e],
        **{name: event[name] for name in ("trust", "logits", "memory_gb")},
        **metrics,
    }


def show(run: dict[str, Any]) -> None:
    """Print a run's row."""
    title = f"{run['run']} ({'cold' if run.get('cold') else 'warm'})"
    if "failed" in run:
        print(f"{title:<44} {run['failed']}", flush=True)
        return
    cells = [
        f"{run['start']:.1f}",
        f"{run['rate']:.3f}",
        f"{run['num_steps']}",
        f"{run['step_ms']:.1f}",
        f"{run['p95']:.1f}",
        f"{run['memory_gb']:.1f}",
        f"{run['mfu_percent']:.1f}",
        f"{run['val_bpb']:.4f}",
        f"{run['scoring_seconds']:.1f}",
        f"{run['audit_seconds']:.1f}",
        f"{run['beyond']:.1f}",
        f"{3600 / (300 + run['beyond']):.1f}",
    ]
    print(f"{title:<44}" + "".join(f"{cell:>9}" for cell in cells), flush=True)


def plot(runs: list[dict[str, Any]], path: str) -> None:
    """Draw each run's training loss, smoothed, in bits per token, and its val_bpb as the legend says."""
    from matplotlib import pyplot  # type: ignore[import-not-found, unused-ignore]

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for run in runs:
        smooth, line = 0.0, []
        for step, (_, loss) in enumerate(run["curve"], 1):
            smooth = 0.95 * smooth + 0.05 * loss
            line.append(smooth / (1 - 0.95**step))
        seconds = [elapsed for elapsed, _ in run["curve"]]
        axes.plot(seconds, line, label=f"{run['run']}: val_bpb {run['val_bpb']:.4f}")
    axes.set(xlabel="seconds of training", ylabel="training loss, nats a token (smoothed)", ylim=(None, 4.0))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("--")] or ["new", "old", "new:seed=1", "old:seed=1"]
    pictures = [word.removeprefix("--plot=") for word in sys.argv[1:] if word.startswith("--plot=")]
    profile = active_profile()
    Prepared.open(profile)  # says what is missing before anything runs
    card = "no GPU"
    if shutil.which("nvidia-smi"):
        card = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.partition(" (")[0]
    print(f"{card}; {machine('torch', 'numpy')}; profile {profile.name}")
    print(HEAD, flush=True)
    runs = []
    with tempfile.TemporaryDirectory() as name:
        for word in words:
            runs.append(judge_run(word, Path(name)))
            show(runs[-1])
    done = [run for run in runs if "failed" not in run]
    for title in ("trust", "logits"):
        print(f"{title}: {', '.join(sorted({str(run[title]) for run in done}))}")
    for run in done:
        print(json.dumps({"run": run["run"], "val_bpb": run["val_bpb"], "curve": run["curve"]}))
    for path in pictures:
        plot(done, path)


if __name__ == "__main__":
    main()
