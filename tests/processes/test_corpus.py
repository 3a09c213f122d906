"""Corpora: what becomes a document, which split it is in, and how files get here.

Needs pyarrow. Downloads come from a real HTTP server in this process that misbehaves on request; nothing leaves the
machine.
"""

import gzip
import hashlib
import json
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from pyarrow import parquet

from oracle.corpus import (
    HELD_OUT,
    DataError,
    FolderCorpus,
    ShardCorpus,
    WheelCorpus,
    check_wheel,
    fetch_wheel,
    folder_documents,
    plain_text,
    text_digest,
)
from oracle.download import ATTEMPTS, download

CONTENT = bytes(range(256)) * 20_000


class Hub:
    """An HTTP server; `faults[path]` lists what goes wrong with its next requests, in order."""

    def __init__(self) -> None:
        self.faults: dict[str, list[str]] = {}
        self.requests: list[str] = []
        self.closing = threading.Event()
        self.asked = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up here
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Send CONTENT, or what the next fault of this path says."""
        path = request.path[1:]
        self.requests.append(path)
        self.asked.set()
        waiting = self.faults.get(path, [])
        fault = waiting.pop(0) if waiting else "none"
        digest = hashlib.sha256(CONTENT).hexdigest()
        if fault.isdigit():
            request.send_error(int(fault))
            return
        if fault.startswith("redirect"):
            request.send_response(302)
            request.send_header("Location", "/storage")
            request.send_header("X-Linked-Etag", f'"{digest if fault == "redirect" else "0" * 64}"')
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(200)
        request.send_header("Content-Length", str(len(CONTENT)))
        request.send_header("ETag", f'"{digest}"')
        request.end_headers()
        if fault == "flips":
            request.wfile.write(b"!" + CONTENT[1:])
        else:
            request.wfile.write(CONTENT if fault == "none" else CONTENT[: len(CONTENT) // 2])
        if fault == "stalls":
            self.closing.wait()

    def close(self) -> None:
        """Stop and let go of stalled requests."""
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Run a server for one test."""
    server = Hub()
    yield server
    server.close()


def fetch(hub: Hub, names: list[str], folder: Path) -> list[str]:
    """Download with pauses and limits too short to notice; return the names of new files as they come."""
    new: list[str] = []
    download(hub.url, names, folder, timeout_s=0.3, pause_s=0.001, received=lambda name, size: new.append(name))
    return new


# ---------------------------------------------------------------------------------------------------------------------
# Downloads


@pytest.mark.parametrize("fault", ["truncates", "stalls", "flips", "503", "429", "redirect to other bytes"])
def test_a_passing_fault_is_repeated(hub: Hub, tmp_path: Path, fault: str) -> None:
    """Two faulty answers, then a good one: the file is whole and nothing else is left."""
    hub.faults = {"a": [fault, fault]}
    assert fetch(hub, ["a"], tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert hub.requests.count("a") == 3


def test_the_digest_of_a_redirect_is_checked(hub: Hub, tmp_path: Path) -> None:
    """A hub announces the digest with the redirect to its storage."""
    hub.faults = {"a": ["redirect"], "storage": ["none"]}
    assert fetch(hub, ["a"], tmp_path) == ["a"]
    assert hub.requests == ["a", "storage"]


@pytest.mark.parametrize("fault", ["404", "403"])
def test_a_lasting_fault_is_told_at_once(hub: Hub, tmp_path: Path, fault: str) -> None:
    """What no repetition mends is asked for once; the message names address and status."""
    hub.faults = {"a": [fault]}
    with pytest.raises(DataError, match=f"{hub.url}a cannot be fetched: the server answers {fault}"):
        fetch(hub, ["a"], tmp_path)
    assert hub.requests == ["a"]
    assert list(tmp_path.iterdir()) == []


def test_patience_ends(hub: Hub, tmp_path: Path) -> None:
    """A server that never recovers is an error after the last attempt, and no broken file stays under the name."""
    hub.faults = {"a": ["503", "truncates"] * ATTEMPTS}
    with pytest.raises(DataError, match=rf"after {ATTEMPTS} attempts .* run the same command to go on"):
        fetch(hub, ["a"], tmp_path)
    assert hub.requests == ["a"] * ATTEMPTS
    assert not (tmp_path / "a").exists()


def test_nobody_there(hub: Hub, tmp_path: Path) -> None:
    """An address without a server is an error that says so."""
    hub.close()
    with pytest.raises(DataError, match="Connection refused"):
        fetch(hub, ["a"], tmp_path)


def test_going_on_fetches_only_what_is_missing(hub: Hub, tmp_path: Path) -> None:
    """Complete files are kept without a request; a torn temporary file is not taken for one."""
    names = [f"shard{i}" for i in range(20)]
    hub.faults = {"shard7": ["404"]}
    with pytest.raises(DataError, match="shard7"):
        fetch(hub, names[:8], tmp_path)
    (tmp_path / "shard9.tmp").write_bytes(CONTENT[:100])
    complete = {path.name for path in tmp_path.iterdir() if path.suffix != ".tmp"}
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in complete}
    fetch(hub, names, tmp_path)
    assert all((tmp_path / name).read_bytes() == CONTENT for name in names)
    assert all((tmp_path / name).stat().st_mtime_ns == at for name, at in before.items())
    assert not list(tmp_path.glob("*.tmp"))


# ---------------------------------------------------------------------------------------------------------------------
# The wheel


def write_wheel(path: Path, models: dict[str, list[str]]) -> Path:
    """Write a wheel of service models: `models[service]` are its documentation strings."""
    with zipfile.ZipFile(path, "w") as wheel:
        for index, (service, texts) in enumerate(models.items()):
            shapes = [{"documentation": text, "members": {"documentation": {}}} for text in texts]
            content = json.dumps({"shapes": shapes, "operations": [{"documentation": "too short"}]}).encode()
            name = f"botocore/data/{service}/2020-01-01/service-2.json"
            wheel.writestr(*((name, content) if index % 2 else (name + ".gz", gzip.compress(content))))
            wheel.writestr(f"botocore/data/{service}/2020-01-01/paginators-1.json", content)
    return path


def test_markup_becomes_plain_text() -> None:
    """Tags go, entities are resolved, blanks collapse; punctuation stays where it was."""
    html = "<p>Use <code>a&lt;b</code>, or\n   <a href='x>y'>&quot;c&quot;</a>.</p>\n<ul> <li>caf&eacute;</li></ul>"
    assert plain_text(html) == 'Use a<b, or "c". café'


def test_a_text_of_the_wheel_is_in_one_split(tmp_path: Path) -> None:
    """Services are held out whole; what several splits say stays in the first of val, heldout, train."""
    pad = " words that make it long enough to count as a document, whatever it is that they may be about here"
    everywhere, two, twice = "everywhere" + pad, "held and trained" + pad, "twice in one" + pad
    own = {name: name + pad for name in ("v", "h", "t")}
    models = {
        "valued": [everywhere, own["v"], f"<p>{own['v']}</p>"],
        "holding": [two, everywhere, own["h"]],
        "training": [everywhere, two, own["t"], twice, twice],
    }
    services = {"val": frozenset({"valued"}), "heldout": frozenset({"holding"})}
    corpus = WheelCorpus(write_wheel(tmp_path / "w.whl", models), services)  # type: ignore[arg-type]
    assert set(corpus.held_out("val")) == {everywhere, own["v"]} and len(corpus.held_out("val")) == 2
    assert set(corpus.held_out("heldout")) == {two, own["h"]}
    assert sorted(corpus.part(0)) == sorted([own["t"], twice])


def test_only_the_pinned_wheel_is_taken(tmp_path: Path) -> None:
    """Another file under its name is refused with both digests, a missing one by its path."""
    other = write_wheel(tmp_path / "botocore-1.43.11-py3-none-any.whl", {})
    with pytest.raises(DataError, match=r"is not the pinned .* not 0108b560"):
        check_wheel(other)
    with pytest.raises(DataError, match=r"nowhere\.whl does not exist"):
        check_wheel(tmp_path / "nowhere.whl")


def test_without_a_registry_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pip that finds nothing is one line that says --wheel, and leaves nothing behind."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match=r"^pip could not fetch botocore==1\.43\.11 .* pass --wheel PATH$"):
        fetch_wheel(tmp_path / "raw")
    assert list((tmp_path / "raw").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# A folder of the user's own, and shards


def write_parquet(path: Path, texts: Iterable[Any], column: str = "text") -> Path:
    """Write a parquet file with small row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({"id": range(len(list(texts))), column: list(texts)}), path, row_group_size=3)
    return path


def splits(corpus: FolderCorpus | ShardCorpus) -> dict[str, list[str]]:
    """Return all documents of a corpus whose held-out splits are read to their ends."""
    found: dict[str, list[str]] = {}
    for split in HELD_OUT:
        found[split] = list(corpus.held_out(split))
        corpus.packed(split, len(found[split]))
    return found | {"train": [text for part in range(corpus.parts) for text in corpus.part(part)]}


TEXTS = [f"document {i}: " + "some text " * (i % 7 + 1) for i in range(60)]


def test_documents_of_a_folder(tmp_path: Path) -> None:
    """Text files and parquet rows of any depth count; hidden, blank and null ones do not."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a.md").write_text("Ünïcode\n")
    (tmp_path / "b.py").write_text("pass")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").write_bytes(b"\xff")
    write_parquet(tmp_path / "deep" / "c.parquet", ["one", None, "", "two"])
    assert sorted(text for _, text in folder_documents(tmp_path)) == ["one", "pass", "two", "Ünïcode\n"]


def test_splits_follow_content_not_names(tmp_path: Path) -> None:
    """Renamed, copied, linked and regrouped documents give the same splits, disjoint and without repetition."""
    for index, text in enumerate(TEXTS):
        (tmp_path / "plain").mkdir(exist_ok=True)
        (tmp_path / "plain" / f"{index}.txt").write_text(text)
    write_parquet(tmp_path / "rows" / "z.parquet", TEXTS[::-1])
    shutil.copytree(tmp_path / "plain", tmp_path / "twice" / "one")
    shutil.copytree(tmp_path / "plain", tmp_path / "twice" / "two")
    for path in (tmp_path / "twice" / "two").iterdir():
        path.rename(path.with_suffix(".rst"))
    (tmp_path / "twice" / "link.parquet").symlink_to(tmp_path / "rows" / "z.parquet")
    found = [FolderCorpus(tmp_path / name, held_out_tokens=60) for name in ("plain", "rows", "twice")]
    first, *others = [splits(corpus) for corpus in found]
    assert others == [first, first]
    assert found[0].identity == found[1].identity == found[2].identity
    assert sorted(text for texts in first.values() for text in texts) == sorted(TEXTS)
    assert all(sum(map(len, first[split])) >= 480 for split in HELD_OUT)


def test_what_packing_does_not_read_is_trained_on(tmp_path: Path) -> None:
    """heldout begins where val's packing stopped, training where heldout's did; the tokenizer sees neither reserve."""
    write_parquet(tmp_path / "a.parquet", TEXTS)
    corpus = FolderCorpus(tmp_path, held_out_tokens=100)
    order = sorted(TEXTS, key=text_digest)
    val = list(corpus.held_out("val"))
    assert val == order[: len(val)] and sum(map(len, val)) >= 800
    later = list(corpus.tokenizer_texts())
    assert later == order[-len(later) :]
    corpus.packed("val", 5)
    heldout = list(corpus.held_out("heldout"))
    assert heldout == order[5 : -len(later)]
    corpus.packed("heldout", 7)
    assert list(corpus.part(0)) == order[12:] and corpus.parts == 1
    corpus = FolderCorpus(tmp_path, held_out_tokens=100, part_bytes=500)
    assert list(corpus.held_out("val")) == val and list(corpus.tokenizer_texts()) == later
    parts = [list(corpus.part(part)) for part in range(corpus.parts)]
    assert [text for part in parts for text in part] == order[-len(later) :]
    assert len(parts) > 2 and all(0 < sum(map(len, part)) < 1_000 for part in parts)


def test_a_third_is_held_back_at_most(tmp_path: Path) -> None:
    """Of little text each split may have a third, so that a third is left to train on."""
    write_parquet(tmp_path / "a.parquet", TEXTS)
    total = sum(map(len, TEXTS))
    corpus = FolderCorpus(tmp_path, held_out_tokens=total // 7)
    longest = max(map(len, TEXTS))
    for texts in splits(corpus).values():
        assert abs(sum(map(len, texts)) - total / 3) <= 2 * longest


def test_a_folder_that_changes_meanwhile_is_named(tmp_path: Path) -> None:
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index}.txt").write_text(text)
    corpus = FolderCorpus(tmp_path, held_out_tokens=60)
    for path in tmp_path.iterdir():
        path.write_text("other")
    with pytest.raises(DataError, match="changed while it was read: run the same command again"):
        list(corpus.part(0))


def _no_text(folder: Path) -> None:
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n")


def _no_parquet(folder: Path) -> None:
    (folder / "broken.parquet").write_bytes(b"PAR1 nothing")


def _no_column(folder: Path) -> None:
    write_parquet(folder / "other.parquet", TEXTS, column="body")


def _numbers(folder: Path) -> None:
    write_parquet(folder / "numbers.parquet", [1, 2])


def _little(folder: Path) -> None:
    (folder / "little.txt").write_text("little")


def _huge(folder: Path) -> None:
    (folder / "a.txt").write_text("huge " * 10_000)


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (lambda folder: folder.rmdir(), r"is not a folder: give --corpus"),
        (lambda folder: None, r"holds no documents: put text files or \*\.parquet"),
        (_no_text, r"picture\.png is not text \(byte 0 is no UTF-8\): move it out"),
        (_no_parquet, r"broken\.parquet cannot be read as parquet"),
        (_no_column, r"other\.parquet has no column `text`, only id, body"),
        (_numbers, r"numbers\.parquet has a column `text` that holds int, not text"),
        (_little, r"holds 0\.0 MB of distinct text, too little for this profile: it needs at least 0\.0 MB"),
        (_huge, r"has too few documents to hold some out: split its files"),
    ],
)
def test_a_folder_that_cannot_serve(tmp_path: Path, fill: Callable[[Path], None], message: str) -> None:
    """Each way a folder can be wrong is one line that names what is wrong."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    fill(folder)
    with pytest.raises(DataError, match=message) as caught:
        FolderCorpus(folder, held_out_tokens=1_000)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_held_out_text_is_never_trained_on(tmp_path: Path) -> None:
    """A val shard copied under a training name adds nothing; order is the shards' own."""
    val = write_parquet(tmp_path / "val.parquet", TEXTS[:10])
    heldout = write_parquet(tmp_path / "heldout.parquet", [*TEXTS[5:20], TEXTS[12]])
    copied = shutil.copy(val, tmp_path / "train0.parquet")
    train = write_parquet(tmp_path / "train1.parquet", TEXTS[:5] + TEXTS[15:40])
    corpus = ShardCorpus([Path(copied), train], {"val": val, "heldout": heldout})
    assert splits(corpus) == {"val": TEXTS[:10], "heldout": TEXTS[10:20], "train": TEXTS[20:40]}
    assert list(corpus.part(0)) == []
