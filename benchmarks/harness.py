"""What the harness costs beside the training: against a shell loop, and as the ledger grows.

    python -m benchmarks.harness [EXPERIMENTS]

1. The loop against a shell loop of the reference's commands (commit, run, grep, amend or reset), in turns in one run,
   over the same ideas, with a trainer that does nothing. Every fifth idea is kept. The processes that each starts are
   counted, and the time of one start is taken in the same run, so that the rest can be told from them.
2. Appending a record and showing results.tsv at 1,000, 10,000 and 100,000 rows.
3. `--autoresearch-status`, and a loop that goes on for one experiment, at 100,000 rows and at a few. CPU seconds of the
   process beside the wall's, which a busy machine stretches.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from benchmarks.machine import machine
from pytest_autoresearch._files import write
from pytest_autoresearch.ledger import Ledger, Record, results_tsv

ROOT = Path(__file__).parents[1]
ROUNDS, KEEP_EVERY = 3, 5
SIZES = (1_000, 10_000, 100_000)
APPENDS, STARTS, COMMITS = 20, 30, 500
GOAL_S, GOAL_ROWS_S = 0.3, 2.0
STATE = ".git/autoresearch/bench"

TRAIN = 'SCORE = {score!r}\nprint("val_bpb: %f\\npeak_vram_mb: 512.0" % SCORE)\nraise SystemExit\n'
RUNNER = """\
import json, os, sys
request = json.loads(sys.stdin.readline())
channel = os.fdopen(int(os.environ["AUTORESEARCH_CHANNEL"]), "w")
answer = {"event": "result", "schema": 1, "status": "ok", "trust": "split"}
answer["fingerprint"] = {"profile": "tiny", "lock": "0" * 64, "device": "cpu", "driver": "", "torch": "2.13.0",
                         "cpu": "a processor's model name", "cpus": 2}
if request["op"] == "check":
    answer |= {"budget_s": 1.0, "profile": "tiny"}
else:
    with open(request["candidate"] + "/train.py") as train:
        score = float(train.readline().split("=")[1])
    answer |= {"metrics": {"val_bpb": score, "training_seconds": 1.0, "total_seconds": 2.0, "peak_vram_mb": 512.0,
                           "mfu_percent": 0.0, "total_tokens_M": 1.0, "num_steps": 200, "num_params_M": 0.5,
                           "depth": 2, "train_bpb": score}, "memory_gb": 0.5, "work": 1e6, "weights_sha256": "f" * 64}
channel.write(json.dumps(answer) + "\\n")
"""
CONFTEST = """\
import os, sys, time
from pathlib import Path

STARTED = []
sys.addaudithook(lambda event, args: STARTED.append(args[0]) if event == "subprocess.Popen" else None)

def pytest_autoresearch_propose(settings, workdir, history, number, seed, refused):
    path = workdir / "train.py"
    path.write_text("SCORE = " + os.environ[f"IDEA_{number}"] + "\\n" + path.read_text().partition("\\n")[2])
    return f"idea {number}"

def pytest_autoresearch_finished(settings, record):
    with open(os.environ["TIMES"], "a") as times:
        times.write(f"{time.time()} {len(STARTED)}\\n")
"""
INI = "[pytest]\nautoresearch_runner = {python} -I -S runner.py\nautoresearch_immutable = runner.py\n"
# one process each: add, commit, the trainer, grep, rev-parse, then reset, or add and commit
SHELL_STARTS = {"discard": 6, "keep": 7}
SHELL = """\
best=1.0
for ((i = 1; i <= COUNT; i++)); do
  idea=IDEA_$i; score=${!idea}
  { echo "SCORE = $score"; tail=$(<rest); echo "$tail"; } > train.py
  git add train.py
  git commit -q -m "experiment: idea $i"
  "$PYTHON" -I -S train.py > run.log 2>&1
  found=$(grep '^val_bpb:\\|^peak_vram_mb:' run.log)
  found=${found#val_bpb: }; got=${found%%$'\\n'*}
  commit=$(git rev-parse --short HEAD)
  if [[ $got < $best ]]; then
    best=$got
    printf '%s\\t%s\\t0.5\\tkeep\\tidea %s\\n' "$commit" "$got" "$i" >> results.tsv
    git add results.tsv
    git commit -q --amend --no-edit
  else
    printf '%s\\t%s\\t0.5\\tdiscard\\tidea %s\\n' "$commit" "$got" "$i" >> results.tsv
    git reset -q --hard HEAD~1
  fi
  echo "$EPOCHREALTIME" >> "$TIMES"
done
"""

Times = dict[str, list[float]]  # seconds, by verdict


def outcome(number: int) -> str:
    return "discard" if number % KEEP_EVERY else "keep"


def project(folder: Path, count: int) -> dict[str, str]:
    """Make the repository; return the environment for work in it, the scores of `count` ideas included."""
    folder.mkdir()
    home = folder.with_name(folder.name + " home")
    home.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "GIT_"))}
    env |= {"HOME": str(home), "GIT_CONFIG_NOSYSTEM": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    env |= {"PYTHON": sys.executable, "TIMES": str(home / "times"), "COUNT": str(count)}
    for number in range(1, count + 1):
        env[f"IDEA_{number}"] = f"{1 - number / 10_000 if outcome(number) == 'keep' else 1 + number / 10_000:.6f}"
    # the size of a real train.py: git hashes it and status looks for its constants
    train = TRAIN.format(score=1.0) + (ROOT / "train.py").read_text()
    (folder / "rest").write_text(train.partition("\n")[2])
    files = {
        "train.py": train,
        "runner.py": RUNNER,
        "conftest.py": CONFTEST,
        "pytest.ini": INI,
        ".gitignore": "run.log\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    for arguments in (["init", "-q", "-b", "main"], ["config", "user.name", "A"], ["config", "user.email", "a@b.c"]):
        subprocess.run(["git", *arguments], cwd=folder, env=env, check=True)
    subprocess.run(["git", "add", "-A"], cwd=folder, env=env, check=True)
    subprocess.run(["git", "commit", "-q", "-m", "project"], cwd=folder, env=env, check=True)
    return env


def pytest_call(*arguments: str) -> list[str]:
    plugins = ["-p", "pytest_autoresearch.plugin", "-p", "no:cacheprovider", "-q", "--autoresearch-tag=bench"]
    return [sys.executable, "-m", "pytest", *plugins, *arguments]


def loop_call(count: int) -> list[str]:
    return pytest_call("--autoresearch-loop", "--autoresearch-rule=strict", f"--autoresearch-max={count}")


def one_loop(folder: Path, command: list[str], count: int) -> tuple[Times, dict[str, list[int]]]:
    """Return seconds, and where they are counted process starts, of each experiment but the first."""
    env = project(folder, count)
    subprocess.run(command, cwd=folder, env=env, check=False, capture_output=True)
    rows = [line.split() for line in Path(env["TIMES"]).read_text().splitlines()]
    assert len(rows) == count, f"{count} experiments were to be made, {len(rows)} were"
    seconds: Times = {"discard": [], "keep": []}
    starts: dict[str, list[int]] = {"discard": [], "keep": []}
    for number in range(2, count + 1):
        before, after = rows[number - 2], rows[number - 1]
        seconds[outcome(number)].append(float(after[0]) - float(before[0]))
        if len(after) > 1:
            starts[outcome(number)].append(int(after[1]) - int(before[1]) + 1)  # and the runner, by its supervisor
    return seconds, starts


def start_s(command: list[str], folder: Path) -> float:
    """Return the median seconds of one start of a command that does nothing."""
    times = []
    for _ in range(STARTS):
        began = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def against_shell(home: Path, count: int) -> None:
    shell: Times = {"discard": [], "keep": []}
    ours: Times = {"discard": [], "keep": []}
    starts: dict[str, list[int]] = {"discard": [], "keep": []}
    for turn in range(ROUNDS):
        for verdict, values in one_loop(home / f"shell {turn}", ["bash", "-c", SHELL], count)[0].items():
            shell[verdict] += values
        seconds, counted = one_loop(home / f"loop {turn}", loop_call(count), count)
        for verdict in ours:
            ours[verdict] += seconds[verdict]
            starts[verdict] += counted[verdict]
    git_s = start_s(["git", "rev-parse", "HEAD"], home / "loop 0")
    python_s = start_s([sys.executable, "-I", "-c", ""], home / "loop 0")
    print(
        f"one experiment, {ROUNDS} rounds of {count} in turns; a start of git {1000 * git_s:.1f} ms, of Python "
        f"{1000 * python_s:.1f} ms"
    )
    print(f"{'':<9}{'shell s':>9}{'loop s':>9}{'ratio':>7}{'starts':>12}{'more starts s':>15}{'rest s':>9}")
    for verdict in shell:
        theirs, own = statistics.median(shell[verdict]), statistics.median(ours[verdict])
        more = statistics.median(starts[verdict]) - SHELL_STARTS[verdict]
        extra = (more - 1) * git_s + python_s  # the supervisor is the one Python more
        both = f"{SHELL_STARTS[verdict]} / {SHELL_STARTS[verdict] + more:.0f}"
        rest = own - theirs - extra
        print(
            f"{verdict:<9}{theirs:>9.3f}{own:>9.3f}{own / theirs:>7.2f}{both:>12}{extra:>15.3f}{rest:>9.3f}"
            f"   goal {GOAL_S}: {'held' if rest <= GOAL_S else 'MISSED'}"
        )


def commits(folder: Path, parent: str) -> list[str]:
    """Return `COMMITS` real commits on `parent`, each with a constant changed."""
    train = (folder / "train.py").read_bytes()
    stream = b""
    for mark in range(1, COMMITS + 1):
        text = train + f"EXTRA = {mark}\n".encode()
        stream += f"commit refs/made\nmark :{mark}\ncommitter a <a@b.c> 0 +0000\ndata 0\nfrom {parent}\n".encode()
        stream += f"M 100644 inline train.py\ndata {len(text)}\n".encode() + text + b"\n"
    marks = folder.with_name("marks")
    command = ["git", "fast-import", "--quiet", "--force", f"--export-marks={marks}"]
    subprocess.run(command, cwd=folder, input=stream, check=True, capture_output=True)
    return [line.split()[1] for line in marks.read_text().splitlines()]


def grown(folder: Path, ledger: Ledger, made: list[str]) -> None:
    """Let the ledger grow to each size, and print what one more record costs there."""
    like = next(run for run in reversed(ledger.runs) if run["verdict"] and run["verdict"]["outcome"] == "discard")

    def record() -> Record:
        number = ledger.next_number()
        new = {"number": number, "commit": made[number % COMMITS], "description": f"EXTRA 0 -> {number}"}
        return {key: value for key, value in like.items() if key != "prev"} | new

    print(
        f"\n{'rows':>9}{'append ms':>12}{'results.tsv ms':>16}   medians of {APPENDS}, {_bytes(ledger)} bytes a record"
    )
    for size in SIZES:
        with patch("os.fsync"):
            while len(ledger.history.rows) < size - APPENDS:
                ledger.append(record())
        append, show = [], []
        for _ in range(APPENDS):
            began = time.perf_counter()
            ledger.append(record())
            append.append(time.perf_counter() - began)
            began = time.perf_counter()
            write(folder / "results.tsv", results_tsv(ledger.history, "val_bpb").encode())
            show.append(time.perf_counter() - began)
        print(f"{size:>9,}{1000 * statistics.median(append):>12.2f}{1000 * statistics.median(show):>16.2f}")


def _bytes(ledger: Ledger) -> int:
    return ledger.path.stat().st_size // (len(ledger.runs) + 1)


def call_s(command: list[str], folder: Path, env: dict[str, str]) -> tuple[float, float]:
    """Return wall and CPU seconds of one call."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=env, check=False, capture_output=True, text=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def at_many_rows(home: Path, count: int) -> None:
    folder = home / "rows"
    env = project(folder, count + 2 * ROUNDS)  # and the ideas of the loops that go on
    calls = {"status": pytest_call("--autoresearch-status"), "go on for one experiment": loop_call(1)}
    subprocess.run(loop_call(KEEP_EVERY), cwd=folder, env=env, check=True, capture_output=True)
    few = {name: [call_s(command, folder, env) for _ in range(ROUNDS)] for name, command in calls.items()}
    ledger = Ledger.open(folder / STATE / "ledger.jsonl")
    grown(folder, ledger, commits(folder, ledger.runs[-1]["parent"]))
    for number in range(1, ROUNDS + 1):
        env[f"IDEA_{ledger.next_number() - 1 + number}"] = f"{2 + number / 1000:.6f}"
    rows = len(ledger.history.rows)
    del ledger
    many = {name: [call_s(command, folder, env) for _ in range(ROUNDS)] for name, command in calls.items()}
    print(
        f"\n{f'at {rows:,} rows':<26}{'wall s':>9}{'CPU s':>9}{'few: wall':>12}{'CPU':>7}{'more: wall':>13}{'CPU':>7}"
        f"   best of {ROUNDS}"
    )
    for name in calls:
        (wall, cpu), (few_wall, few_cpu) = min(many[name]), min(few[name])
        cost = wall if name == "status" else wall - few_wall  # an experiment takes its time at any size
        print(
            f"{name:<26}{wall:>9.2f}{cpu:>9.2f}{few_wall:>12.2f}{few_cpu:>7.2f}{wall - few_wall:>13.2f}"
            f"{cpu - few_cpu:>7.2f}   goal {GOAL_ROWS_S}: {'held' if cost <= GOAL_ROWS_S else 'MISSED'}"
        )


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    print(machine("pytest", "GitPython", "orjson"))
    with tempfile.TemporaryDirectory(prefix="autoresearch-harness-") as name:
        against_shell(Path(name), count)
        at_many_rows(Path(name), count)


if __name__ == "__main__":
    main()
