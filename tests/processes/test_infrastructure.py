"""The machine's failures, told from the candidate's by what the judge itself sees: memory that the system took back, a
disk without room. A candidate that only looks like them crashes by its own fault.

Needs the `cache` fixture; a control group and a small file system of its own, where the machine allows them. A busy GPU
is the one kind that no test here can make.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugin.lab import WAIT_S
from tests.processes.judging import JUDGE, judge
from tests.processes.test_judge import HONEST
from tests.shortage import little_memory, small_disk

IN_GROUP = f"""
import os
open({{procs!r}}, "w").write(str(os.getpid()))
{JUDGE}
"""
# Takes all the memory that the group has left, until the kernel kills the largest process of the group for it
NEIGHBOUR = """
import os, sys, time
procs, ready = sys.argv[1:]
open(procs, "w").write(str(os.getpid()))
kills = lambda: next(line for line in open("/proc/vmstat") if line.startswith("oom_kill "))
before, mine = kills(), []
while not os.path.exists(ready): time.sleep(0.01)
while kills() == before: mine.append(bytearray(b"x") * 2**24)
"""
# well over half of what the group may have
LARGE = HONEST.replace(
    "    for step,", "    held = torch.ones(300_000_000)\n    open('ready', 'w').close()\n    for step,", 1
)


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_a_trainer_that_the_system_killed_for_its_memory_is_no_fault_of_the_candidate(
    tmp_path: Path, cache: Path
) -> None:
    ready = tmp_path / "run/scratch/trainer/ready"
    with little_memory(f"autoresearch-test-{os.getpid()}", 2_200) as group:
        procs = str(group / "cgroup.procs")
        with subprocess.Popen([sys.executable, "-c", NEIGHBOUR, procs, str(ready)]) as neighbour:
            try:
                code = IN_GROUP.format(procs=procs)
                result = judge(tmp_path / "run", cache, LARGE, code=code, budget_s=20.0).result
                assert neighbour.wait(timeout=WAIT_S) in (0, -signal.SIGKILL)  # next, before that memory is free
            finally:
                neighbour.kill()
    assert (result["status"], result["kind"]) == ("crash", "killed"), result
    assert re.fullmatch("the training process ended with signal 9, .* out of memory .*", result["reason"])


def test_a_judge_without_room_to_work_in_says_so(tmp_path: Path, cache: Path) -> None:
    with small_disk(tmp_path / "run/scratch", "nr_inodes=1"):
        result = judge(tmp_path / "run", cache, HONEST).result
    assert (result["status"], result["kind"]) == ("crash", "disk"), result
    assert "No space left on device" in result["reason"]
