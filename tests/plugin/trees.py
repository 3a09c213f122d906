"""Process trees that are hard to end, as Python programs.

Each appends one line, the pid of what is hard to end, to the file that PIDS names once it is up, and then blocks.
"""

import os
import sys
from pathlib import Path

import psutil

BLOCK = "import time\nwhile True: time.sleep(600)"
REPORT = "open(os.environ['PIDS'], 'a').write(f'{child}\\n')"
START = f"child = subprocess.Popen([sys.executable, '-S', '-c', {BLOCK!r}], start_new_session=%s).pid; {REPORT}"
FLOOD_BYTES = 50_000_000
TREES = {
    "plain child": f"import os, subprocess, sys; {START % False}\n{BLOCK}",
    "deaf grandchild": (
        "import os, signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"signal.signal(signal.SIGINT, signal.SIG_IGN); {START % False}\n{BLOCK}"
    ),
    "new session": f"import os, subprocess, sys; {START % True}\n{BLOCK}",
    "double fork": (
        "import os, signal\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        f"        child = os.getpid(); {REPORT}\n"
        "        signal.pause()\n"
        "    os._exit(0)\n"
        "signal.pause()"
    ),
    "thread storm": (
        "import os, threading, time\n"
        "for _ in range(100): threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        f"child = os.getpid(); {REPORT}\n"
        "while True:\n"
        "    thread = threading.Thread(target=time.sleep, args=(0.01,)); thread.start(); thread.join()"
    ),
    "flood": (
        "import os\n"
        f"for _ in range({FLOOD_BYTES // 50_000}): os.write(1, b'x' * 50_000)\n"
        f"child = os.getpid(); {REPORT}\n{BLOCK}"
    ),
}
LEFT_BEHIND = f"import os, subprocess, sys; {START % True}"  # ends at once


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a tree that reports into `folder`."""
    return {**os.environ, "PIDS": str(folder / "pids")}


def is_up(folder: Path) -> bool:
    """Return whether the tree that reports into `folder` is complete."""
    path = folder / "pids"
    return path.exists() and path.read_text().endswith("\n")


def named(folder: Path) -> list[psutil.Process]:
    """Return the processes that a tree named and that still exist."""
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]


def command(tree: str) -> list[str]:
    """Return the command of a tree."""
    return [sys.executable, "-S", "-c", tree]
