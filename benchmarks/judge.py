"""What judging costs: sealed (bubblewrap, Landlock) against split against inproc, in turns in one run.

    python -m benchmarks.judge [ROUNDS]

Needs the prepared profile tiny. Judges train.py as the plugin does, with a short training, and takes the time of each
phase from the judge's own events. `inproc` scores the same weights by `evaluate_bpb` in one process. The passes are the
model's forward passes over the same rows, and `own` is what the judge does with their logits (copy, score, note for the
audit), both in CPU seconds of one thread, which a busy machine disturbs less than wall time.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.judging import judge
from benchmarks.machine import machine
from oracle import sandbox
from oracle.constants import TINY

ROOT = Path(__file__).parents[1]
TRAIN_S = 2.0
GOAL_OWN, GOAL_CHECKS = 0.05, 0.25  # of scoring; of the budget
COLUMNS = ("trainer start", "scorer start", "scoring", "audit", "checks", "passes", "own")

# in a process of its own: seconds of evaluate_bpb, then CPU seconds of the passes and of the judge's work on the logits
INPROC = """
import sys, time, torch, numpy as np
from pathlib import Path
from safetensors.torch import load_file
from oracle._candidate import build, load
from oracle.audit import Audit
from oracle.constants import TINY
from oracle.evaluate import Tally, evaluate_bpb, pinned
from oracle.judge import AUDIT_ROWS
from oracle.prepared import Prepared
from oracle.run import ModelSpec
device = torch.device("cpu")
prepared = Prepared.open(TINY)
spec = ModelSpec(vocab_size=TINY.vocab_size, seq_len=TINY.seq_len, device=device)
model = build(load(Path(sys.argv[1])).build_model, spec)
model.load_state_dict(load_file(sys.argv[2]))
model.eval()
began = time.perf_counter()
evaluate_bpb(model, prepared.tokenizer(), TINY.eval_batch)
evaluating = time.perf_counter() - began
rows = np.array(prepared.val_rows())
tally = Tally(prepared.token_bytes(), prepared.bos_id)
audit = Audit(rows, vocab_size=TINY.vocab_size, count=AUDIT_ROWS)
times = [0.0, 0.0]
with pinned(device, 1):
    for start in range(0, len(rows), TINY.eval_batch):
        which = slice(start, start + TINY.eval_batch)
        tokens = torch.from_numpy(rows[which, :-1].astype(np.int64))
        at = [time.process_time()]
        logits = model(tokens).float()
        at.append(time.process_time())
        mine = logits.clone()
        tally.add(rows[which], mine)
        audit.watch(slice(start, start + len(tokens)), mine)
        at.append(time.process_time())
        times = [a + b - c for a, b, c in zip(times, at[1:], at)]
print(evaluating, *times)
"""

# in a process of its own: seconds from a scorer's start until it is ready, as the judge starts it
START = """
import sys, time
from pathlib import Path
from oracle.constants import TINY
from oracle.prepared import Prepared
from oracle._wire import sealed_copy
from oracle.scoring import Scorer
prepared = Prepared.open(TINY)
began = time.perf_counter()
weights = sealed_copy(Path(sys.argv[2]).read_bytes())
with Scorer(prepared, candidate=Path(sys.argv[1]), scratch=Path(sys.argv[2]).parent.parent, seed=0) as scorer:
    scorer.load(weights)
    print(time.perf_counter() - began)
"""


def judge_at(folder: Path, level: sandbox.Level) -> dict[str, float]:
    """Judge train.py once; return seconds by phase."""
    source, env = (ROOT / "train.py").read_text(), {"AUTORESEARCH_SANDBOX": level}
    run = judge(folder, source, env=env, profile=TINY.name, budget_s=TRAIN_S)
    if run.result.get("status") != "ok":
        sys.exit(f"error: {run.result.get('reason')}\n{run.log[-3000:]}")
    at, metrics = run.at, run.result["metrics"]
    trainer_start = at["train"] - at["start"]
    return {
        "trainer start": trainer_start,
        "scoring": metrics["scoring_seconds"],
        "audit": metrics["audit_seconds"],
        "checks": at["result"] - at["start"] - metrics["training_seconds"] - trainer_start,
    }


def measure(code: str, folder: Path, level: sandbox.Level) -> list[float]:
    """Run `code` in a fresh process on the weights of the last judging."""
    arguments = [str(folder / "candidate"), str(folder / "scratch/trainer/weights.safetensors")]
    env = {**os.environ, "AUTORESEARCH_SANDBOX": level, "AUTORESEARCH_PROFILE": TINY.name}
    env.setdefault("GOMP_SPINCOUNT", "100000")  # as the judge does
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=env, check=True, stdout=subprocess.PIPE)
    return [float(word) for word in done.stdout.split()]


def show(name: str, values: dict[str, list[float]]) -> None:
    cells = [values.get(column, []) for column in COLUMNS]
    print(f"{name:<22}" + "".join(f"{spread(cell):>16}" for cell in cells))


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} +-{(max(values) - min(values)) / 2:.2f}" if values else "-"


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    levels: list[sandbox.Level] = [level for level in sandbox.LEVELS if sandbox.works(level)]
    times: dict[sandbox.Level, list[dict[str, float]]] = {level: [] for level in levels}
    inproc: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(rounds):
            for level in levels:
                figures = judge_at(folder, level)
                evaluating, passes, own = measure(INPROC, folder, "none")
                (start,) = measure(START, folder, level)
                figures |= {"passes": passes, "scorer start": start, "own": own}
                times[level].append(figures)
                inproc.append(evaluating)
    print(machine("torch", "numpy"))
    print(f"{'seconds, ' + str(rounds) + ' rounds':<22}" + "".join(f"{column:>16}" for column in COLUMNS))
    for level, runs in times.items():
        title = "split" if level == "none" else f"sealed ({level})"
        show(title, {column: [run[column] for run in runs] for column in COLUMNS})
    show("inproc", {"scoring": inproc})
    for level, runs in times.items():
        own = statistics.median(run["own"] / (run["own"] + run["passes"]) for run in runs)
        checks = statistics.median(run["checks"] / TINY.budget_s for run in runs)
        ratio = spread([run["scoring"] / split["scoring"] for run, split in zip(runs, times["none"], strict=True)])
        print(
            f"{level}: own {own:.1%} of passes and own (goal {GOAL_OWN:.0%}), checks {checks:.1%} of the budget "
            f"(goal {GOAL_CHECKS:.0%}), scoring {ratio} of split's"
        )


if __name__ == "__main__":
    main()
