"""THREATS class 4, the data: what is on disk is what the manifest says or there is no run, weights are only ever a
plain safetensors file, and a candidate sees no token that the judge did not hand out.

Needs the `cache` fixture; the attacks marked `sealed` need a sandbox. Documents duplicated across splits and a val set
that is too short are refused when data is prepared: tests/processes/test_corpus.py and test_prepare.py.
"""

import io
import json
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from oracle.prepared import signed
from tests.attacks.lab import Attack, attack, source
from tests.processes.judging import FEW_ROWS, judge


def replaced_by(code: str) -> str:
    """Return code that saves `model` at the path `weights` by `code` and says that it is done."""
    return f"weights = ORDER['weights']\n{code}\nsay(op='returned'); say(op='done', peak_device_mb=0.0); time.sleep(60)"


WEIGHTS = {
    "a pickle": "torch.save(model.state_dict(), weights)",
    "a pickle that runs code": (
        "import pickle\nclass Run:\n    def __reduce__(self): return (print, ('UNPICKLED',))\n"
        "pickle.dump(Run(), open(weights, 'wb'))"
    ),
    "cut off": (
        "import safetensors.torch\nsafetensors.torch.save_file(model.state_dict(), weights)\n"
        "os.truncate(weights, 2_000_000)"
    ),
    "a link to another file": "os.symlink('/etc/passwd', weights)",
    "a link to an endless file": "os.symlink('/dev/zero', weights)",
    "a named pipe": "os.mkfifo(weights)",
    "a folder": "os.mkdir(weights)",
    "a terabyte of nothing": "open(weights, 'wb').truncate(2**40)",
    "empty": "open(weights, 'wb')",
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_a_plain_safetensors_file_or_nothing(holds: Callable[[Attack], None], name: str) -> None:
    code = replaced_by(WEIGHTS[name])
    holds(attack("score", "weights|[sS]afetensor|while scoring", after=code, never="UNPICKLED", may_crash="audit"))


def test_weights_that_the_scorer_replaces_are_no_way_to_break_the_judge(
    holds: Callable[[Attack], None],
) -> None:
    swap = """
        if SCORING:
            try: os.unlink("../trainer/weights.safetensors"); os.mkfifo("../trainer/weights.safetensors")
            except OSError: pass
        return self.table[tokens]
    """
    holds(attack(forward=swap, may_crash="audit", reason="weights"))


# Says what it reached: val rows, a checkpoint that an earlier run left anywhere, home, the network, other processes.
SEARCH = """
    import numpy, pathlib, tempfile
    HOME = pathlib.Path("HOUSE")
    def reach(what, act):
        try: act()
        except Exception: return
        print("REACHED", what, flush=True)
    def first(pattern, wanted): return [p for p in glob.glob(pattern) if wanted in open(p, "rb").read()][0]
    ours = ("1", str(os.getpid()))
    def foreign(pattern): return [open(p, "rb") for p in glob.glob(pattern) if p.split("/")[2] not in ours][0]
    def judge():
        open(f"/proc/{os.getppid()}/cmdline", "rb").read().index(b"oracle.judge")
        os.kill(os.getppid(), 0)
    reach("val", lambda: numpy.load("CACHE/tiny/val.npy"))
    reach("the manifest", lambda: open("CACHE/tiny/manifest.json").read())
    reach("a file beside the run", lambda: open("BESIDE/ledger.jsonl").read())
    reach("the log of the run", lambda: open("BESIDE/run0/run.log", "r+"))
    reach("a file at home", lambda: [open(path) for path in HOME.iterdir() if path.is_file()][0])
    reach("its own source", lambda: open(os.path.join(ORDER["candidate"], "train.py"), "a").write("#"))
    reach("the oracle's source", lambda: open(sys.modules["oracle.run"].__file__, "a"))
    reach("a listening server", lambda: socket.create_connection(("127.0.0.1", PORT), timeout=2))
    reach("an abstract socket", lambda: socket.socket(socket.AF_UNIX).connect("\\0PORT"))
    reach("the judge", judge)
    reach("the judge's process", lambda: first("/proc/[0-9]*/cmdline", b"oracle.judge"))
    reach("the environment of another", lambda: foreign("/proc/[0-9]*/environ"))
    reach("the memory of another", lambda: foreign("/proc/[0-9]*/mem"))
    for place in ("/tmp", "/dev/shm", "/var/tmp", HOME, HOME / ".cache", tempfile.gettempdir()):
        path = pathlib.Path(place) / "MARK"
        reach(f"what a run before left in {place}", lambda: path.read_bytes())
        try: path.write_bytes(b"a checkpoint")
        except OSError: pass
    print("SEARCHED", flush=True)
"""


def test_no_file_and_nobody_is_within_reach(tmp_path: Path, cache: Path, trust: str) -> None:
    if trust != "sealed":
        pytest.skip(f"needs a sandbox; trust here is {trust}")
    (tmp_path / "ledger.jsonl").write_text("{}")
    with socket.socket() as server, socket.socket(socket.AF_UNIX) as local:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        local.bind(f"\0{port}")
        local.listen()
        known = {
            "HOUSE": Path.home(),
            "CACHE": cache,
            "BESIDE": tmp_path,
            "PORT": port,
            "MARK": f"attack-{tmp_path.name}",
        }
        search = SEARCH
        for word, value in known.items():
            search = search.replace(word, str(value))
        for number in range(2):  # the second time looks for what the first one left
            run = judge(tmp_path / f"run{number}", cache, source(top=search), code=FEW_ROWS)
            reached = sorted({line for line in run.log.splitlines() if line.startswith("REACHED")})
            assert run.result["status"] == "ok" and not reached, (run.result, reached)
            assert run.log.count("SEARCHED") == 3  # the trainer and both scorers


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def doubled(path: Path) -> None:
    np.save(path, np.load(path) * 2)


def pickled(path: Path) -> None:
    buffer = io.BytesIO()
    pickle.dump(np.load(path), buffer)
    path.write_bytes(buffer.getvalue()[: path.stat().st_size].ljust(path.stat().st_size))


def first_shard(home: Path) -> Path:
    return min(home.glob("train-*.npy"))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "val copied under a train name": (
        lambda home: shutil.copyfile(home / "val.npy", first_shard(home)),
        "train-00000.npy is damaged",
    ),
    "val shortened": (
        lambda home: np.save(home / "val.npy", np.load(home / "val.npy")[:8]),
        "val.npy is damaged",
    ),
    "val of easy rows": (
        lambda home: np.save(home / "val.npy", np.zeros_like(np.load(home / "val.npy"))),
        "val.npy is damaged .its sha256",
    ),
    "val as a pickle": (lambda home: pickled(home / "val.npy"), "val.npy is damaged"),
    "twice the bytes a token": (lambda home: doubled(home / "token_bytes.npy"), "token_bytes.npy is damaged"),
    "another tokenizer": (
        lambda home: (home / "tokenizer.json").write_text((home / "tokenizer.json").read_text().replace("A", "B", 1)),
        "tokenizer.json is damaged",
    ),
    "a flipped bit in a shard": (lambda home: flipped(first_shard(home)), "train-00000.npy is damaged"),
    "a shard cut off": (
        lambda home: first_shard(home).write_bytes(first_shard(home).read_bytes()[:-1000]),
        "train-00000.npy is damaged",
    ),
    "a shard gone": (lambda home: first_shard(home).unlink(), "train-00000.npy is missing"),
    "a manifest that names less": (
        lambda home: (home / "manifest.json").write_text(
            json.dumps({**json.loads((home / "manifest.json").read_text()), "files": {}})
        ),
        "manifest.json is damaged",
    ),
}


@pytest.fixture
def home(tmp_path: Path, cache: Path) -> Path:
    copy = tmp_path / "cache/tiny"
    copy.mkdir(parents=True)
    for path in (cache / "tiny").iterdir():
        if path.is_file():
            shutil.copyfile(path, copy / path.name)
    return copy


@pytest.mark.parametrize("name", DAMAGE)
def test_data_that_was_changed_is_not_judged_on(home: Path, tmp_path: Path, name: str) -> None:
    damage, reason = DAMAGE[name]
    damage(home)
    result = judge(tmp_path / "run", home.parent, op="check").result
    assert result["status"] == "unusable", result
    assert reason.split(" .")[0] in result["reason"] and "python -m oracle.prepare" in result["reason"], result


def test_data_with_a_manifest_to_match_has_another_fingerprint(home: Path, tmp_path: Path, cache: Path) -> None:
    """A consistent forgery is other data: scores of different fingerprints are never compared."""
    from oracle.corpus import file_digest

    doubled(home / "token_bytes.npy")
    manifest = json.loads((home / "manifest.json").read_text())
    manifest["files"]["token_bytes.npy"]["sha256"] = file_digest(home / "token_bytes.npy")
    (home / "manifest.json").write_text(json.dumps(signed(manifest)))
    forged = judge(tmp_path / "forged", home.parent, op="check").result
    honest = judge(tmp_path / "honest", cache, op="check").result
    assert forged["status"] == honest["status"] == "ok"
    assert forged["fingerprint"]["data"] != honest["fingerprint"]["data"]
