"""What code in the sandbox can reach, at each level: what it was given and nothing else; and that honest training does
not notice.

Needs Linux with bubblewrap or Landlock; a level that this machine lacks is skipped. The judge's runs need the `cache`
fixture. Victims are real: files, listening sockets, and this test's own process.
"""

import contextlib
import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oracle import sandbox
from oracle.sandbox import Level
from tests.processes.judging import FEW_ROWS, ROOT, judge

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="bubblewrap and Landlock are Linux's")
SEALED: tuple[Level, ...] = ("bubblewrap", "landlock")


@pytest.fixture(params=SEALED)
def level(request: pytest.FixtureRequest) -> Level:
    chosen: Level = request.param
    if not sandbox.works(chosen):
        pytest.skip(f"{chosen} does not work on this machine")
    return chosen


class Place:
    """A run directory with victims around it, and a way to run Python code in the sandbox."""

    def __init__(self, level: Level, home: Path) -> None:
        self.level = level
        self.run = home / "repo/.git/autoresearch/tag/runs/1-1"
        self.candidate, self.scratch = self.run / "candidate", self.run / "scratch"
        for folder in (self.candidate, self.scratch):
            folder.mkdir(parents=True)
        (self.candidate / "train.py").write_text("mine")
        self.hidden = [
            home / "cache/tiny/val.npy",
            home / "repo/results.tsv",
            home / "repo/.git/HEAD",
            home / "repo/.git/autoresearch/tag/ledger.jsonl",
            self.run / "run.log",
            home / ".netrc",
        ]
        for path in self.hidden:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("secret")

    def python(self, code: str, *fds: int) -> Any:
        """Run `code`, which sets `answer`; return that."""
        command = sandbox.wrap(
            [sys.executable, "-P", "-c", f"import ctypes, json, os, socket, sys\n{code}\nprint(json.dumps(answer))"],
            self.level,
            writable=self.scratch,
            readable=[self.candidate],
        )
        env = {**sandbox.environment(self.level, writable=self.scratch), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=self.scratch, env=env, capture_output=True, text=True, pass_fds=fds)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def place(level: Level, tmp_path: Path) -> Place:
    return Place(level, tmp_path)


TRY = """
def attempt(action, *args):
    try:
        action(*args)
    except OSError as error:
        return "refused"
    return "done"
"""


def test_it_reads_the_candidate_and_the_oracle_but_no_data_ledger_repository_or_home(place: Place) -> None:
    hidden = [
        *place.hidden,
        ROOT / "pyproject.toml",
        ROOT / "tests/conftest.py",
        ROOT / "train.py",
        Path.home() / ".bashrc",
        Path("/etc/shadow"),
        Path("/etc/hostname"),
    ]
    paths = [str(path) for path in hidden if path.exists()]
    folders = [str(ROOT / ".git"), str(place.run.parent), str(Path.home()), "/var", "/home", "/mnt"]
    answer = place.python(
        f"{TRY}\nopen({sandbox.__file__!r}).close()\n"
        f"answer = [open({str(place.candidate / 'train.py')!r}).read(),\n"
        f"          [p for p in {paths} if attempt(open, p) != 'refused'],\n"
        f"          [e for p in {folders} if attempt(os.listdir, p) != 'refused' for e in os.listdir(p)]]"
    )
    assert answer[:2] == ["mine", []]
    # bubblewrap makes the folders that lead to what it shows; nothing else is in them
    assert set(answer[2]) <= {"1-1", *Path(sys.base_prefix).parts, *Path(sys.prefix).parts}


def test_it_writes_in_scratch_only(place: Place) -> None:
    oracle = Path(sandbox.__file__).parent
    packages = Path(json.__file__).parent
    targets = [
        place.candidate / "train.py",
        *(folder / "new" for folder in (place.candidate, place.run, oracle, packages, Path(sys.prefix) / "bin")),
        *(
            Path(folder, "autoresearch-new")
            for folder in ("/", "/etc", "/usr/lib", "/var/tmp", "/dev/shm", "/tmp", "/sys")
        ),
    ]
    answer = place.python(
        f"{TRY}\nimport tempfile\nanswer = [attempt(open, p, 'w') for p in {[*map(str, targets)]}]\n"
        "open('mine', 'w').write('x')\nfile = tempfile.NamedTemporaryFile(delete=False)\n"
        "assert attempt(os.mkdir, os.path.expanduser('~/.cache')) == 'done'"
    )
    assert set(answer[:-3]) == {"refused"} or place.level == "bubblewrap"  # which has a /dev/shm and /tmp of its own
    assert (place.candidate / "train.py").read_text() == "mine"
    assert [path for path in targets[1:] if path.exists()] == []
    assert (place.scratch / "mine").read_text() == "x"


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[list[tuple[int, int, Any]]]:
    """Sockets that listen on this machine: TCP, UDP, a path, an abstract name."""
    with contextlib.ExitStack() as stack:
        addresses: list[tuple[int, int, Any]] = []
        for family, kind, address in (
            (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            (socket.AF_UNIX, socket.SOCK_STREAM, str(tmp_path / "socket")),
            (socket.AF_UNIX, socket.SOCK_STREAM, f"\0autoresearch-{os.getpid()}"),
        ):
            server = stack.enter_context(socket.socket(family, kind))
            server.bind(address)
            if kind == socket.SOCK_STREAM:
                server.listen()
            addresses.append((int(family), int(kind), server.getsockname()))
        yield addresses


SEND = """
def send(family, kind, address):
    if isinstance(address, bytes): address = address.decode()
    with socket.socket(family, kind) as s:
        s.settimeout(5)
        s.connect(tuple(address) if isinstance(address, list) else address)
        s.send(b'x')
        if kind == socket.SOCK_DGRAM: s.recv(1)
"""


def test_it_reaches_no_socket_of_this_machine(place: Place, listening: list[tuple[int, int, Any]]) -> None:
    addresses = [
        [f, k, a.decode() if isinstance(a, bytes) else list(a) if isinstance(a, tuple) else a] for f, k, a in listening
    ]
    answer = place.python(f"{TRY}{SEND}\nanswer = [attempt(send, *to) for to in json.loads({json.dumps(addresses)!r})]")
    assert answer == ["refused"] * 4


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
def test_a_compiler_makes_what_a_process_then_loads(place: Place) -> None:
    """As Triton does for the launcher of each kernel: with Python's headers, in the temporary directory."""
    code = """
        import subprocess, sysconfig, tempfile
        folder = tempfile.mkdtemp()
        with open(f"{folder}/it.c", "w") as file: file.write("#include <Python.h>\\nint it(void) { return 7; }")
        include = sysconfig.get_paths()["include"]
        command = ["cc", f"{folder}/it.c", "-O3", "-shared", "-fPIC", f"-I{include}", "-o", f"{folder}/it.so"]
        done = subprocess.run(command, capture_output=True, text=True)
        answer = done.stderr or ctypes.CDLL(f"{folder}/it.so").it()
    """
    assert place.python(textwrap.dedent(code)) == 7


def test_where_no_semaphore_can_be_made_nothing_compiles_in_a_pool(place: Place) -> None:
    code = """
        import multiprocessing
        try: multiprocessing.Lock(); able = True
        except OSError: able = False
        answer = able or os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    """
    assert place.python(textwrap.dedent(code)) is True


def test_it_sees_signals_and_traces_no_other_process(place: Place) -> None:
    """The victim is this process; a signal 0 would do nothing, and PTRACE_SEIZE (0x4206) stops nobody."""
    me = os.getpid()
    with open(place.hidden[0]) as secret:
        proc = [f"/proc/{me}/{name}" for name in ("status", "cmdline", "environ", "mem", f"fd/{secret.fileno()}")]
        answer = place.python(
            f"{TRY}\nlibc = ctypes.CDLL(None)\n"
            f"answer = [[attempt(open, p) for p in {proc}], attempt(os.listdir, '/proc/{me}/fd'),\n"
            f"          attempt(os.readlink, '/proc/{me}/fd/{secret.fileno()}'),\n"
            f"          libc.ptrace(0x4206, {me}, None, None),\n"
            f"          attempt(os.kill, {me}, 0), attempt(os.kill, {os.getppid()}, 0),\n"
            "          [attempt(open, f'/proc/{n}/cmdline') for n in range(2, 400) if n != os.getpid()].count('done')]"
        )
    *_, mine = answer
    assert answer[:-1] == [["refused"] * 5, "refused", "refused", -1, "refused", "refused"]
    assert mine == 0  # bubblewrap's own pid 1 apart


def test_it_has_no_capability_and_gains_none(place: Place) -> None:
    answer = place.python("answer = [s.split() for s in open('/proc/self/status') if s.startswith(('Cap', 'NoNew'))]")
    status = dict(answer)
    assert int(status["CapEff:"], 16) == int(status["CapPrm:"], 16) == 0
    assert status["NoNewPrivs:"] == "1"


def test_shared_memory_that_outlives_a_process_is_not_there_for_the_next(place: Place) -> None:
    """A System V segment (the flags: create, mode 600) stays until it is removed; a later run could read it."""
    key = 0x41525300 + os.getpid() % 256
    place.python(f"ctypes.CDLL(None).shmget({key}, 4096, 0o1600)\nanswer = 0")
    assert ctypes.CDLL(None).shmget(key, 0, 0) == -1


def test_inherited_descriptors_work(place: Place) -> None:
    ours, theirs = socket.socketpair()
    memory = os.memfd_create("test")
    os.truncate(memory, 4096)
    code = (
        f"import mmap\nwith mmap.mmap({memory}, 4096) as m: m[:5] = b'hello'\n"
        f"s = socket.socket(fileno={theirs.fileno()})\ns.send(b'there')\nanswer = s.recv(9).decode()"
    )
    with ours, theirs:
        ours.send(b"and back")
        assert place.python(code, theirs.fileno(), memory) == "and back"
        assert ours.recv(9) == b"there"
    assert os.pread(memory, 5, 0) == b"hello"
    os.close(memory)


HONEST = """
import ctypes, hashlib, os, pathlib, sys, tempfile
import torch
from torch import nn
import torch.nn.functional as F


TRAINING = str("oracle.trainer" in pathlib.Path("/proc/self/cmdline").read_text())  # or is this a scorer?


class Bigram(nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(vocab, vocab))

    def forward(self, tokens):
        return F.embedding(tokens, self.table)


def build_model(spec):
    assert "Bigram" in pathlib.Path(__file__).read_text()
    for path in [*pathlib.Path("..").glob("*/note-*"), *pathlib.Path().glob("note-*")]:
        if path.read_text() != TRAINING: print("LEAK", path, flush=True)
    pathlib.Path(f"note-{os.getpid()}").write_text(TRAINING)
    return Bigram(spec.vocab_size)


def train(run):
    model = build_model(run.spec).to(run.device)
    hashlib.sha256(torch.ones(60_000_000).numpy()).digest()
    with tempfile.TemporaryFile() as file: torch.save(model.state_dict(), file)
    print("THREADS", torch.get_num_threads(), flush=True)
    for step, (inputs, targets, epoch) in enumerate(run.batches(8)):
        if step < 3:
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            model.zero_grad()
            loss.backward()
            with torch.no_grad(): model.table -= 200 * model.table.grad
            run.log(step, loss)
    return model
"""


def at(level: Level, tmp_path: Path, cache: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("AUTORESEARCH_SANDBOX", level)
    return judge(tmp_path / level, cache, source, code=FEW_ROWS)


def test_honest_training_is_the_same_in_every_sandbox_and_in_none(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same steps give the same score to the last bit, and the memory of the trainer is counted."""
    levels = [level for level in (*SEALED, "none") if sandbox.works(level)]
    if levels == ["none"]:
        pytest.skip("no sandbox works on this machine")
    runs = {level: at(level, tmp_path, cache, HONEST, monkeypatch) for level in levels}
    for level, run in runs.items():
        assert run.result["status"] == "ok", (run.result, run.log)
        assert run.result["trust"] == ("split" if level == "none" else "sealed")
        assert ("LEAK" in run.log) == (level == "none")  # only there do they see each other's folders
    split = runs["none"].result
    for run in runs.values():
        assert run.result["metrics"]["val_bpb"] == split["metrics"]["val_bpb"]
        assert run.result["memory_gb"] == pytest.approx(split["memory_gb"], rel=0.1)
        assert run.log.partition("THREADS ")[2].split()[0] == runs["none"].log.partition("THREADS ")[2].split()[0]


def test_the_oracle_is_the_pristine_copy_that_the_judge_runs_from(
    level: Level, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the loop: nothing but PYTHONPATH says where it lies, in a folder that the sandbox does not show."""
    monkeypatch.setenv("AUTORESEARCH_SANDBOX", level)
    locked = tmp_path / "locked"
    shutil.copytree(Path(sandbox.__file__).parent, locked / "oracle", ignore=shutil.ignore_patterns("__pycache__"))
    source = "import oracle.run\nraise Exception(oracle.run.__file__)"
    result = judge(tmp_path / "run", cache, source, cold=True, root=locked).result
    assert result["reason"] == f"Exception: {locked / 'oracle/run.py'} (train.py:2)", result


def test_a_signal_that_ended_the_trainer_is_named(
    level: Level, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = HONEST.replace("    hashlib", "    os.kill(os.getpid(), 9)\n    hashlib")
    result = at(level, tmp_path, cache, source, monkeypatch).result
    assert (result["kind"], result["reason"]) == (
        "error",
        "the training process ended with signal 9 before it returned a model",
    )


def test_the_trust_is_sealed_wherever_a_sandbox_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTORESEARCH_SANDBOX", raising=False)
    sandbox.available.cache_clear()
    try:
        best = sandbox.available()
        assert sandbox.trust() == ("sealed" if any(map(sandbox.works, SEALED)) else "split")
        assert best == next((level for level in SEALED if sandbox.works(level)), "none")
    finally:
        sandbox.available.cache_clear()


def test_a_level_that_does_not_exist_is_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTORESEARCH_SANDBOX", "firejail")
    result = judge(tmp_path / "run", cache, op="check").result
    assert result["status"] == "unusable"
    assert result["reason"] == "AUTORESEARCH_SANDBOX is 'firejail': choose one of bubblewrap, landlock, none"
