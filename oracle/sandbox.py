"""What a candidate's process can reach: an allow-list that the kernel enforces.

Two levels do it. `bubblewrap`: namespaces of its own for files, processes, network and IPC, where only the allowed
paths exist. `landlock`: the process restricts itself, in trusted code and for good, before the candidate is loaded;
paths by Landlock (ABI 6 or later: older kernels let signals out), sockets and IPC that outlives a process by a seccomp
filter, because Landlock knows neither. `none` where neither works. AUTORESEARCH_SANDBOX=bubblewrap|landlock|none asks
for one level and no other. Both levels are `sealed`.

`python -P -m oracle.sandbox ALLOWED COMMAND...` restricts itself by Landlock and becomes COMMAND.
"""

import ctypes
import functools
import glob
import json
import os
import platform
import runpy
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

Level = Literal["bubblewrap", "landlock", "none"]
LEVELS: tuple[Level, ...] = ("bubblewrap", "landlock", "none")

# never a whole prefix: a project or its data may live in /usr/src or beside a virtual environment's bin
_PREFIX_PARTS = (
    "bin",
    "include",
    "lib",
    "lib64",
    "libexec",
    "nvvm",
    "pyvenv.cfg",
    "sbin",
    "share",
    "targets",
)
_SYSTEM = (
    *("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/sys"),
    *(f"/usr/{part}" for part in (*_PREFIX_PARTS, "lib32")),
    *(f"/usr/local/{part}" for part in _PREFIX_PARTS),
    *("/usr/local/cuda*", "/usr/local/nvidia", "/opt/nvidia"),
    *(f"/etc/{name}" for name in ("alternatives", "group", "ld.so.cache", "localtime", "nsswitch.conf", "passwd")),
)
_DEVICES = ("/dev/nvidia*", "/dev/dxg")
_PLAIN_DEVICES = (
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
)  # bubblewrap makes its own
_PROC = tuple(
    f"/proc/{name}"
    for name in (
        "cpuinfo",
        "devices",
        "driver",
        "filesystems",
        "loadavg",
        "meminfo",
        "self",
        "stat",
        "sys",
        "version",
    )
)
# seccomp refuses: connect, shmget, semget, msgget, mq_open, add_key, request_key, keyctl, io_uring_setup; and socket,
# but for the one kind that CUDA's driver asks for at its start, which is of no use without connect
_CALLS = {
    "x86_64": (0xC000003E, 41, (42, 29, 64, 68, 240, 248, 249, 250, 425)),
    "aarch64": (0xC00000B7, 198, (203, 194, 190, 186, 180, 217, 218, 219, 425)),
}
_AF_UNIX, _SOCK_SEQPACKET = 1, 5
_CUDA_PROBE = "import ctypes, sys; sys.exit(ctypes.CDLL('libcuda.so.1').cuInit(0))"


class SandboxError(Exception):
    """The user asks for a level that does not exist."""


@functools.cache
def available() -> Level:
    """Return the best level that works here, found out by starting something in it, once a process."""
    wanted = os.environ.get("AUTORESEARCH_SANDBOX")
    if wanted is not None and wanted not in LEVELS:
        raise SandboxError(f"AUTORESEARCH_SANDBOX is {wanted!r}: choose one of {', '.join(LEVELS)}")
    return next((level for level in LEVELS if wanted in (None, level) and works(level)), "none")


def trust() -> Literal["sealed", "split"]:
    """Return what a score that is judged here is worth."""
    return "split" if available() == "none" else "sealed"


def works(level: Level) -> bool:
    """Tell whether `level` can be used on this machine, with its GPU where there is an Nvidia one."""
    if level == "none":
        return True
    if sys.platform != "linux" or (level == "bubblewrap" and shutil.which("bwrap") is None):
        return False
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""  # from whoever is to use the CPU
    probe = [sys.executable, "-P", "-c", _CUDA_PROBE] if glob.glob("/dev/nvidia[0-9]*") and not hidden else ["true"]
    with tempfile.TemporaryDirectory() as folder:
        command = wrap(probe, level, writable=Path(folder), readable=())
        return subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def wrap(command: Sequence[str], level: Level, *, writable: Path, readable: Iterable[Path]) -> list[str]:
    """Return the command that runs `command` in the sandbox, to be started with `writable` as its working directory.

    It sees the interpreter, the system's libraries, the oracle's code and `readable`; it writes below `writable`, and
    in bubblewrap also in a /tmp and a /dev/shm of its own, which end with it. Inherited descriptors stay open. It ends
    with the command's exit status; bubblewrap says 128 + N for signal N.
    """
    if level == "none":
        return list(command)
    seen = [*_existing(_SYSTEM), *_interpreter(), *_compiler(), Path(__file__).parent, *readable]
    if level == "landlock":
        allowed = {
            "read": [*map(str, seen), *map(str, _existing(_PROC))],
            "write": [str(writable)],
            "own": ["/proc/self"],  # where the CUDA driver names its threads
            "device": [*map(str, _existing((*_PLAIN_DEVICES, *_DEVICES)))],
        }
        return [sys.executable, "-P", "-m", "oracle.sandbox", json.dumps(allowed), *command]
    options = ["--unshare-all", "--unshare-user", "--die-with-parent", "--cap-drop", "ALL"]
    options += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    for path in _existing(_DEVICES):
        options += ["--dev-bind", str(path), str(path)]
    for path in dict.fromkeys(name for one in seen for name in (one, one.resolve())):
        options += ["--ro-bind", str(path), str(path)]
    options += ["--bind", str(writable), str(writable), "--remount-ro", "/", "--chdir", str(writable)]
    return ["bwrap", *options, "--", *command]


def environment(level: Level, *, writable: Path) -> dict[str, str]:
    """Return the environment of a sandboxed process: this one's, with a home and a temporary directory that it has."""
    if level == "none":
        return dict(os.environ)
    environment = {**os.environ, "HOME": str(writable), "TMPDIR": str(writable), "PYTHONDONTWRITEBYTECODE": "1"}
    if level == "landlock":  # which has no /dev/shm, and so no semaphores for a pool of compiling processes
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    return environment


def _existing(patterns: Iterable[str]) -> list[Path]:
    return [Path(name) for pattern in patterns for name in sorted(glob.glob(pattern))]


def _interpreter() -> list[Path]:
    """Return what Python needs to start: parts of its prefixes and its library folders, wherever a build puts them."""
    prefixes = dict.fromkeys((sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix))
    parts = [f"{prefix}/{part}" for prefix in prefixes for part in _PREFIX_PARTS]
    libraries = [path for name, path in sysconfig.get_paths().items() if name.endswith(("stdlib", "lib"))]
    return _existing(map(glob.escape, dict.fromkeys([*parts, *libraries])))


def _compiler() -> list[Path]:
    """Return the parts of the prefix that the C compiler is in: torch.compile and Triton start it, wherever it lies."""
    found = [Path(path) for name in (os.environ.get("CC", "cc"), "gcc", "clang") if (path := shutil.which(name))]
    prefixes = dict.fromkeys(place.parents[1] for path in found for place in (path, path.resolve()))
    parts = ("bin", "include", "lib", "lib64", "libexec")
    return _existing(f"{glob.escape(str(prefix))}/{part}" for prefix in prefixes for part in parts)


def _restrict(allowed: dict[str, list[str]]) -> None:
    """Restrict this process and all that it starts by Landlock, seccomp and the loss of every capability."""
    from landlockpy import AccessFS, AccessNet, Ruleset, Scope, abi_version, fs_for_abi, net_for_abi

    abi = abi_version()
    if abi < 6 or platform.machine() not in _CALLS:
        sys.exit(
            f"no sandbox: Landlock ABI {abi} on {platform.machine()}, needed is 6 or later on {' or '.join(_CALLS)}"
        )
    read = AccessFS.EXECUTE | AccessFS.READ_FILE | AccessFS.READ_DIR
    device = AccessFS.READ_FILE | AccessFS.WRITE_FILE | AccessFS.TRUNCATE | AccessFS.IOCTL_DEV
    write = fs_for_abi(abi) & ~(AccessFS.MAKE_CHAR | AccessFS.MAKE_BLOCK | AccessFS.IOCTL_DEV)
    own = read | AccessFS.WRITE_FILE | AccessFS.TRUNCATE
    of_files = read & ~AccessFS.READ_DIR | device
    scope = Scope.SIGNAL | Scope.ABSTRACT_UNIX_SOCKET
    with Ruleset(handled_fs=fs_for_abi(abi), handled_net=net_for_abi(abi), scoped=scope, best_effort=False) as rules:
        for kind, rights in (("read", read), ("write", write), ("own", own), ("device", device)):
            for name in allowed[kind]:
                rules.allow_path(name, rights if os.path.isdir(name) and kind != "device" else rights & of_files)
        assert AccessNet.CONNECT_TCP in rules.handled_net
        rules.restrict()
    libc = ctypes.CDLL(None, use_errno=True)
    header, nothing = (
        struct.pack("Ii", 0x20080522, 0),
        bytes(24),
    )  # capability.h: version 3; no capability in any set
    filters = _seccomp_filter()
    buffer = ctypes.create_string_buffer(filters, len(filters))
    program = struct.pack("HxxxxxxP", len(filters) // 8, ctypes.addressof(buffer))
    # prctl: PR_SET_SECCOMP, SECCOMP_MODE_FILTER; Landlock has set no_new_privs already
    if libc.capset(header, nothing) or libc.prctl(22, 2, program, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _seccomp_filter() -> bytes:
    """Return a BPF program (linux/filter.h) that answers the calls of `_CALLS` with EPERM and lets all others pass."""
    architecture, socket, calls = _CALLS[platform.machine()]
    load, equal, at_least, mask, answer = 0x20, 0x15, 0x35, 0x54, 0x06
    refuse, kill, allow = 0x00050001, 0x80000000, 0x7FFF0000
    number, machine, domain, kind = 0, 4, 16, 24  # offsets in struct seccomp_data
    checks = [(at_least, 0x40000000), *((equal, call) for call in calls)]  # first: x32's numbers for the same calls
    program = [(load, 0, 0, machine), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, number)]
    program += [(code, len(checks) + 6 - index, 0, value) for index, (code, value) in enumerate(checks)]
    program += [(equal, 0, 5, socket), (load, 0, 0, domain), (equal, 0, 4, _AF_UNIX)]
    program += [(load, 0, 0, kind), (mask, 0, 0, 0xF), (equal, 0, 1, _SOCK_SEQPACKET)]
    program += [(answer, 0, 0, allow), (answer, 0, 0, refuse)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def _become(command: list[str]) -> None:
    """Run the command in this process's place; a Python module in this very interpreter.

    A new one would look for the oracle by listing the folder that it lies in. That is closed to it, and Landlock could
    open it only with all that is below; this one has found the oracle already.
    """
    if command[:3] != [sys.executable, "-P", "-m"]:
        os.execvp(command[0], command)
    sys.argv = command[3:]
    runpy.run_module(command[3], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _restrict(json.loads(sys.argv[1]))
    _become(sys.argv[2:])
