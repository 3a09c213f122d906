"""The ledger: nothing written is lost, any damage is named, and its views tell the truth. Needs a file system."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pytest_autoresearch import ledger
from pytest_autoresearch.ledger import Ledger, LedgerError, results_tsv, run_record
from pytest_autoresearch.records import Candidate, Policy, Result, Verdict

HERE = {"device": "cpu", "versions": ["2.13", 1]}


def record(
    number: int = 1,
    score: float | None = 0.997,
    outcome: str | None = "discard",
    *,
    kind: Any = "experiment",
    run: int = 1,
    commit: str = "c" * 40,
    description: str = "wider",
    attempt: int = 1,
    memory_gb: float = 44.04,
    time: str | None = None,
    fingerprint: dict[str, Any] = HERE,
) -> ledger.Record:
    result = Result(
        status="crash" if score is None else "ok",
        score=score,
        memory_gb=memory_gb,
        reason="it broke" if score is None else "",
        fingerprint=fingerprint,
        metrics={"num_steps": 12},
    )
    verdict: Any = Verdict(outcome=outcome, reason="so", gain=0.1) if outcome else None  # type: ignore[arg-type]
    candidate = Candidate(
        number=number, commit=commit, parent="p" * 40, description=description, lines_added=-2, attempt=attempt
    )
    return run_record(
        kind=kind,
        candidate=candidate,
        run=run,
        seed=5,
        signature="s" * 64,
        policy=Policy() if outcome else None,
        result=result,
        verdict=verdict,
        time=time,
    )


def baseline(score: float, run: int) -> ledger.Record:
    return record(0, score, None, kind="baseline", run=run, commit="b" * 40, description="baseline")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nächte 1" / "nov23" / "ledger.jsonl"


def plain(records: Sequence[ledger.Record]) -> list[ledger.Record]:
    """Return records as they were before the ledger linked them."""
    return [{key: value for key, value in one.items() if key != "prev"} for one in records]


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_records_survive_reopening(path: Path) -> None:
    first = Ledger.open(path)
    records = [baseline(1.0, 1), record(1, None, "crash", description="tab\there\nand \x1b[31m naïve ")]
    for one in records:
        first.append(one)
    again = Ledger.open(path)
    assert again.runs == first.runs == again.history == Ledger.read(path).runs
    assert plain(again.runs) == records
    assert (again.secret, again.repaired) == (first.secret, None)
    assert len(again.secret) == 32
    assert json.loads(path.read_text().splitlines()[0])["tag"] == "nov23"
    assert ledger.result_of(again.runs[1]) == Result(
        status="crash", memory_gb=44.04, reason="it broke", fingerprint=HERE, metrics={"num_steps": 12}
    )
    assert ledger.candidate_of(again.runs[1]).description == "tab here and [31m naïve"
    assert again.known.standing("b" * 40, HERE, Policy()).scores == (1.0,)


def test_what_is_no_json_for_others_is_read_back(path: Path) -> None:
    log = Ledger.open(path)
    odd = record(1, None, "crash")
    odd["result"] |= {"reason": "half a pair \ud800", "metrics": {"loss": math.inf}}
    log.append(odd)
    log.append(record(2))
    assert plain(Ledger.open(path).runs) == [odd, record(2, time=log.runs[1]["time"])]


def test_each_line_holds_the_digest_of_the_one_before(path: Path) -> None:
    log = Ledger.open(path)
    for number in range(1, 4):
        log.append(record(number))
        lines = lines_of(path)
        assert path.with_name("ledger.head").read_text() == f"{len(lines)} {sha256(lines[-1]).hexdigest()}\n"
    for before, line in pairwise([b"", *lines]):
        assert next(iter(json.loads(line).items())) == ("prev", sha256(before).hexdigest() if before else "")


def test_a_record_torn_at_any_byte_is_cut_off(path: Path) -> None:
    log = Ledger.open(path)
    log.append(baseline(1.0, 1))
    whole, head = path.read_bytes(), path.with_suffix(".head").read_bytes()
    log.append(record(1, description="née torn"))
    line = path.read_bytes()[len(whole) :]
    for torn in [*(line[:size] for size in range(1, len(line), 29)), b"\0" * 99 + line[99:]]:
        path.write_bytes(whole + torn)
        path.with_suffix(".head").write_bytes(head)
        reader = Ledger.read(path)  # a loop may be writing it just now
        assert (len(reader.runs), reader.repaired, path.read_bytes()) == (1, None, whole + torn)
        again = Ledger.open(path)
        assert again.repaired == f"cut off a torn last record ({len(torn)} bytes) of {path}"
        assert len(again.runs) == 1
        assert path.read_bytes() == whole
    assert Ledger.open(path).repaired is None


def test_a_first_line_torn_begins_anew(path: Path) -> None:
    Ledger.open(path)
    path.write_bytes(path.read_bytes()[:20])
    path.with_suffix(".head").unlink()  # it comes after the line
    again = Ledger.open(path)
    assert again.repaired and again.runs == [] and len(again.secret) == 32


def test_a_kill_between_line_and_head_is_no_damage(path: Path) -> None:
    log = Ledger.open(path)
    for number in (1, 2):
        head = path.with_suffix(".head").read_bytes()
        log.append(record(number))
    path.with_suffix(".head").write_bytes(head)
    assert len(Ledger.read(path).runs) == 2
    assert path.with_suffix(".head").read_bytes() == head
    assert len(Ledger.open(path).runs) == 2
    assert path.with_suffix(".head").read_bytes() != head


def flipped(line: bytes) -> bytes:
    """Change one digit of the score, which leaves JSON."""
    return line.replace(b'"score": 0.997', b'"score": 0.897')


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        pytest.param(lambda ls: [ls[0].replace(b"nov", b"dec"), *ls[1:]], "line 1 was changed", id="the first"),
        pytest.param(lambda ls: [*ls[:2], flipped(ls[2]), *ls[3:]], "line 3 was changed", id="one in the middle"),
        pytest.param(lambda ls: [*ls[:-1], flipped(ls[-1])], "line 6 was changed", id="the last"),
        pytest.param(
            lambda ls: [*ls[:2], ls[2].replace(b': "', b': "0', 1), *ls[3:]], "line 3 was changed", id="a link"
        ),
        pytest.param(lambda ls: [*ls[:2], b"not json\n", *ls[3:]], "line 3 was changed", id="no JSON"),
        pytest.param(
            lambda ls: [ls[0], flipped(ls[1]), ls[2], flipped(ls[3]), *ls[4:]], "lines 2, 4 were changed", id="two"
        ),
        pytest.param(lambda ls: [*ls[:2], *ls[3:]], "line 3 is missing", id="one is missing"),
        pytest.param(lambda ls: [*ls[:2], *ls[4:]], "lines 3, 4 are missing", id="two are missing"),
        pytest.param(lambda ls: ls[1:], "line 1 is missing", id="the first is missing"),
        pytest.param(lambda ls: ls[:-2], "lines 5, 6 are missing", id="the last are missing"),
        pytest.param(
            lambda ls: [ls[0], ls[2], *ls[4:]], "lines are missing before what is now lines 2, 3", id="two gaps"
        ),
        pytest.param(lambda ls: [], "lines 1, 2, 3, 4, 5, 6 are missing", id="all are missing"),
        pytest.param(lambda ls: [*ls[:-1], ls[-1][:90]], "line 6 was changed", id="the last is cut"),
        pytest.param(lambda ls: [*ls[:-1], ls[-1][:-1]], "line 6 was changed", id="its newline is cut"),
        pytest.param(
            lambda ls: [ls[0], ls[2], ls[1], *ls[3:]], "lines 2, 3 are out of order", id="neighbours change places"
        ),
        pytest.param(
            lambda ls: [*ls[:2], ls[5], ls[3], ls[4], ls[2]], "lines 3, 6 are out of order", id="two change places"
        ),
        pytest.param(lambda ls: [*ls[:3], ls[2], *ls[3:]], "line", id="one stands twice"),
    ],
)
def test_damage_is_named(path: Path, damage: Callable[[list[bytes]], list[bytes]], named: str) -> None:
    log = Ledger.open(path)
    for number in range(1, 6):
        log.append(record(number))
    path.write_bytes(b"".join(damage(lines_of(path))))
    before = path.read_bytes()
    for act in (Ledger.open, Ledger.read):
        with pytest.raises(LedgerError, match=re.escape(f"{path} is damaged ({named}")) as caught:
            act(path)
        assert str(caught.value).endswith(": restore it, or begin another with --autoresearch-tag NEW")
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == before


@given(st.data())
def test_no_damage_passes(data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        log = Ledger.open(path)
        for number in range(1, data.draw(st.integers(1, 5))):
            log.append(record(number))
        lines = lines_of(path)
        at = st.integers(0, len(lines) - 1)
        what = data.draw(st.sampled_from(["flip", "drop", "swap", "twice"]))
        one, other = data.draw(at), data.draw(at)
        if what == "flip":
            offset = data.draw(st.integers(0, len(lines[one]) - 1))
            flip = data.draw(st.integers(1, 255))
            lines[one] = lines[one][:offset] + bytes([lines[one][offset] ^ flip]) + lines[one][offset + 1 :]
        elif what == "drop":
            del lines[one]
        elif what == "twice":
            lines.insert(other + 1, lines[one])
        else:
            assume(one != other)
            lines[one], lines[other] = lines[other], lines[one]
        path.write_bytes(b"".join(lines))
        with pytest.raises(LedgerError, match=r"is damaged \(.*line"):
            Ledger.open(path)


def test_a_damaged_head_is_one_line(path: Path) -> None:
    Ledger.open(path).append(record())
    path.with_suffix(".head").write_text("2 abc\n")
    with pytest.raises(LedgerError, match=r"ledger.head is damaged: restore it, or remove it if you know"):
        Ledger.open(path)
    path.with_suffix(".head").unlink()
    assert len(Ledger.open(path).runs) == 1
    assert path.with_suffix(".head").exists()


def test_another_version_is_named(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text('{"prev": "", "schema": 1, "type": "night", "secret": "00"}\n')
    with pytest.raises(
        LedgerError, match=r"line 1 is of another version than 2: begin another with --autoresearch-tag"
    ):
        Ledger.open(path)


def test_reading_makes_nothing(path: Path) -> None:
    with pytest.raises(LedgerError, match=f"there is no ledger {re.escape(str(path))}"):
        Ledger.read(path)
    assert not path.parent.exists()


def test_a_full_disk_leaves_only_whole_records(path: Path) -> None:
    Ledger.open(path).append(baseline(1.0, 1))
    before = path.read_bytes()
    limited = (  # in a child, a limit on file size acts as a disk that fills up in the middle of the record
        "import resource, signal, sys, pathlib\n"
        "from pytest_autoresearch.ledger import Ledger, LedgerError\n"
        "log = Ledger.open(pathlib.Path(sys.argv[1]))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)\n"
        "try:\n    log.append({k: v for k, v in log.runs[0].items() if k != 'prev'})\n"
        "except LedgerError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, str(path), str(len(before) + 40)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"cannot write the ledger {path}: ")
    assert path.read_bytes() == before
    assert len(Ledger.open(path).runs) == 1


def test_a_folder_in_the_way_is_one_line(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(LedgerError, match=r"cannot read the ledger .*: Is a directory"):
        Ledger.open(path)


def test_numbers_and_seeds(path: Path) -> None:
    log = Ledger.open(path)
    assert (log.next_number(), log.next_run(0)) == (1, 1)
    log.append(baseline(1.0, 1))
    log.append(record(4))
    assert (log.next_number(), log.next_run(0), log.next_run(4), log.next_run(5)) == (5, 2, 2, 1)
    seeds = {log.seed(number, run) for number in range(50) for run in (1, 2, 3)}
    assert len(seeds) == 150 and all(0 <= seed < 2**31 for seed in seeds)
    assert Ledger.open(path).seed(7, 1) == log.seed(7, 1)
    assert Ledger.open(path.parent.parent / "other" / "ledger.jsonl").seed(7, 1) != log.seed(7, 1)


def test_what_waits_for_another_run(path: Path) -> None:
    log = Ledger.open(path)
    assert log.pending() is None
    for outcome, waits in (("confirm", True), ("retry", True), ("keep", False)):
        log.append(record(1, outcome=outcome))
        assert (log.pending() is not None) == waits == (Ledger.open(path).pending() is not None)
    log.append(record(1, outcome=None, kind="champion", run=4))
    assert log.pending() is None


ROWS = [  # a run, and whether it makes a row
    (baseline(0.9979, 1), True),
    (record(1, 0.9932, "keep", commit="b2c3d4e" + "0" * 33, description="raise\tthe LR\nto 0.04"), True),
    (record(2, 1.005, "discard", commit="c3d4e5f" + "0" * 33), True),
    (record(3, None, "crash", commit="d4e5f6a" + "0" * 33), False),  # repaired below
    (record(1, 0.994, None, kind="champion", run=2), False),
    (record(3, None, "retry", commit="d4e5f6a" + "1" * 33, attempt=2), False),
    (record(3, 0.9951, "discard", commit="d4e5f6b" + "1" * 33, attempt=2, run=3), True),
    (record(4, 0.9, "confirm", commit="e5f6a7b" + "0" * 33), False),
    (record(4, 0.99, "keep", kind="confirm", run=2, commit="e5f6a7b" + "0" * 33, memory_gb=44.15), True),
    (record(5, None, "crash", commit="f5f6a7b" + "0" * 33), True),
    (record(6, 0.9, "confirm"), False),  # unfinished
    (record(4, 0.991, None, kind="claim", run=3), False),
]


def test_results_table() -> None:
    runs = [run for run, _ in ROWS]
    table = (
        "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
        "bbbbbbb\t0.997900\t44.0\tkeep\tbaseline\n"
        "b2c3d4e\t0.993200\t44.0\tkeep\traise the LR to 0.04\n"
        "c3d4e5f\t1.005000\t44.0\tdiscard\twider\n"
        "d4e5f6b\t0.995100\t44.0\tdiscard\twider\n"
        "e5f6a7b\t0.990000\t44.1\tkeep\twider\n"
        "f5f6a7b\t0.000000\t0.0\tcrash\twider\n"
    )
    assert results_tsv(runs, "val_bpb") == table
    history = ledger.History(runs)
    assert history.rows == [run for run, shown in ROWS if shown]
    assert ledger.champion_record(runs) == runs[8]
    assert ledger.champion_record(runs[:1]) == runs[0]
    assert ledger.champion_record([]) is None


def test_rows_kept_between_tables_are_those_of_a_fresh_table() -> None:
    history = ledger.History()
    for count, (run, _) in enumerate(ROWS, 1):
        history.append(run)
        assert results_tsv(history, "val_bpb") == results_tsv([run for run, _ in ROWS[:count]], "val_bpb")


PUBLIC = (  # as the public system writes it, with Windows line ends and a byte order mark
    "\N{BOM}commit\tval_bpb\tmemory_gb\tstatus\tdescription\r\n"
    "a1b2c3d\t0.997900\t44.0\tkeep\tbaseline\r\n"
    "c3d4e5f\t1.005000\t44.0\tdiscard\tswitch to GeLU activation\r\n"
    "d4e5f6g\t0.000000\t0.0\tcrash\tdouble model width (OOM)\r\n"
)


def test_an_imported_table_comes_first_and_is_never_ranked(path: Path) -> None:
    log = Ledger.open(path)
    log.import_results(PUBLIC, "old.tsv", "val_bpb")
    log.append(record(1, 1.2, "discard"))
    again = Ledger.open(path)
    assert again.imported == log.imported and again.history == log.history == [*log.imported, *log.runs]
    assert [row["result"]["score"] for row in again.imported] == [0.9979, 1.005, None]
    assert {(row["type"], row["kind"], row["verdict"]["reason"]) for row in again.imported} == {
        ("import", "import", "imported from old.tsv")
    }
    plain_text = PUBLIC.removeprefix("\N{BOM}").replace("\r", "")
    assert results_tsv(again.history, "val_bpb") == plain_text + "ccccccc\t1.200000\t44.0\tdiscard\twider\n"
    assert ledger.champion_record(again.history) is None
    assert (again.next_number(), again.next_run(0)) == (2, 1)
    assert again.known.standing("a1b2c3d", {}, Policy()).scores == ()


def test_importing_again_changes_nothing_and_another_table_is_refused(path: Path) -> None:
    log = Ledger.open(path)
    log.import_results(PUBLIC, "old.tsv", "val_bpb")
    before = path.read_bytes()
    again = Ledger.open(path)
    again.import_results(PUBLIC.replace("\r", ""), "copy.tsv", "val_bpb")
    with pytest.raises(LedgerError, match=r"other.tsv cannot be imported, .* has the rows of old.tsv already"):
        again.import_results(PUBLIC.replace("1.005", "1.006"), "other.tsv", "val_bpb")
    assert path.read_bytes() == before
    again.append(record())
    before = path.read_bytes()
    Ledger.open(path).import_results(PUBLIC, "old.tsv", "val_bpb")
    assert path.read_bytes() == before
    late = Ledger.open(path.parent.parent / "late" / "ledger.jsonl")
    late.append(record())
    with pytest.raises(
        LedgerError, match=r"old.tsv cannot be imported, .* has runs already: use --autoresearch-tag NEW"
    ):
        late.import_results(PUBLIC, "old.tsv", "val_bpb")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("val_bpb", "val_loss", r"line 1: 'commit.*' are not the columns commit, val_bpb, memory_gb, status, descr"),
        (PUBLIC, "", "line 1: '' are not the columns"),
        ("\tkeep\tbaseline", "\tkeep", r"line 2: 'a1b2c3d.*keep' has 4 cells, not 5"),
        ("discard", "maybe", r"line 3: 'maybe' is none of the statuses keep, discard, crash"),
        ("1.005000", "0.000000", r"line 3: '0.000000' is no score to discard; is it a crash\?"),
        ("1.005000", "nan", r"line 3: 'nan' is no score"),
        ("1.005000", "1,005", r"line 3: '1,005' is no score"),
        ("1.005000\t44.0", "1.005000\tbig", r"line 3: 'big' is not a size in GB"),
        ("d4e5f6g", "../x", r"line 4: '../x' is not the name of a commit"),
    ],
)
def test_a_bad_row_is_one_line_and_nothing_is_imported(path: Path, old: str, new: str, message: str) -> None:
    log = Ledger.open(path)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=rf"^some/old\.tsv, {message}") as caught:
        log.import_results(PUBLIC.replace(old, new), "some/old.tsv", "val_bpb")
    assert "\n" not in str(caught.value)
    assert (path.read_bytes(), log.imported) == (before, [])


def test_earlier_nights_are_the_prior(path: Path) -> None:
    nights = path.parent.parent
    fresh = nights / "new" / "ledger.jsonl"
    assert ledger.prior(fresh.parent, HERE) == (0.0, 0.0)
    for name, scores in (("one", (1.0, 1.2)), ("two", (2.0, 2.1, 2.2)), ("new", (5.0, 9.0))):
        log = Ledger.open(nights / name / "ledger.jsonl")
        for run, score in enumerate(scores, 1):
            log.append(baseline(score, run))
            log.append(record(0, 3.0 * run, None, kind="baseline", run=run, fingerprint={"device": "gpu"}))
    (nights / "old").mkdir()
    (nights / "old" / "ledger.jsonl").write_text("of another version\n")
    sigma, freedom = ledger.prior(fresh.parent, HERE)
    assert sigma**2 == pytest.approx((0.02 + 0.02) / 3) and freedom == 3
    for run in range(3, 30):
        Ledger.open(nights / "one" / "ledger.jsonl").append(baseline(1.1, run))
    assert ledger.prior(fresh.parent, HERE)[1] == ledger.PRIOR_FREEDOM


@given(st.text(st.characters()))
def test_any_description_is_one_cell_and_one_line(text: str) -> None:
    table = results_tsv([record(description=text)], "val_bpb")
    header, row, end = table.split("\n")
    assert (header.count("\t"), row.count("\t"), end) == (4, 4, "")
    assert len(row.splitlines()) == 1


def test_a_head_that_cannot_be_written_takes_the_record_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Ledger.open(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(LedgerError, match=f"cannot write the ledger {re.escape(str(path))}: No space left on device"):
        log.append(record())
    assert (path.read_bytes(), log.runs) == (before, [])
    monkeypatch.undo()
    log.append(record())
    assert len(Ledger.open(path).runs) == 1
