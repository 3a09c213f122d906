"""The ledger: nothing written is lost, damage is named, and its views tell the truth. Needs a file system."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_autoresearch import ledger
from pytest_autoresearch.ledger import Ledger, LedgerError, results_tsv, run_record
from pytest_autoresearch.records import Candidate, Result, Verdict

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
    memory_gb: float = 44.04,
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
    candidate = Candidate(number=number, commit=commit, parent="p" * 40, description=description, lines_added=-2)
    return run_record(kind=kind, candidate=candidate, run=run, seed=5, result=result, verdict=verdict)


def baseline(score: float, run: int) -> ledger.Record:
    return record(0, score, None, kind="baseline", run=run, commit="b" * 40, description="baseline")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nächte 1" / "nov23" / "ledger.jsonl"


def test_records_survive_reopening(path: Path) -> None:
    first = Ledger.open(path)
    records = [baseline(1.0, 1), record(1, None, "crash", description="tab\there\nand \x1b[31m naïve ")]
    for one in records:
        first.append(one)
    again = Ledger.open(path)
    assert again.runs == first.runs == records
    assert (again.secret, again.repaired) == (first.secret, None)
    assert len(again.secret) == 32
    assert json.loads(path.read_text().splitlines()[0])["tag"] == "nov23"
    assert ledger.result_of(again.runs[1]) == Result(
        status="crash", memory_gb=44.04, reason="it broke", fingerprint=HERE, metrics={"num_steps": 12}
    )
    assert ledger.candidate_of(again.runs[1]).description == "tab here and [31m naïve"


def test_a_record_torn_at_any_byte_is_cut_off(path: Path) -> None:
    log = Ledger.open(path)
    log.append(baseline(1.0, 1))
    whole = path.read_bytes()
    log.append(record(1, description="née torn"))
    line = path.read_bytes()[len(whole) :]
    for size in range(1, len(line), 7):
        path.write_bytes(whole + line[:size])
        again = Ledger.open(path)
        assert again.repaired == f"cut off a torn last record ({size} bytes) of {path}"
        assert len(again.runs) == 1
        assert path.read_bytes() == whole
    assert Ledger.open(path).repaired is None


def test_a_first_line_torn_begins_anew(path: Path) -> None:
    Ledger.open(path)
    path.write_bytes(path.read_bytes()[:20])
    again = Ledger.open(path)
    assert again.repaired and again.runs == [] and len(again.secret) == 32


@pytest.mark.parametrize(
    ("number", "damage"),
    [
        (1, b'{"schema": 1, "type": "night"}'),
        (2, b"not json"),
        (2, b'{"schema": 1, "type": "run"}'),
        (3, b'{"schema": 2, "type": "run"}'),  # of a later version: last, but no torn line
        (2, b'{"schema": 1, "type": "night", "secret": "00"}'),
    ],
)
def test_damage_elsewhere_is_named(path: Path, number: int, damage: bytes) -> None:
    log = Ledger.open(path)
    log.append(baseline(1.0, 1))
    log.append(record())
    lines = path.read_bytes().splitlines()
    lines[number - 1] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=rf"ledger.jsonl, line {number} is damaged: restore it") as caught:
        Ledger.open(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_a_full_disk_leaves_only_whole_records(path: Path) -> None:
    Ledger.open(path).append(baseline(1.0, 1))
    before = path.read_bytes()
    limited = (  # in a child, a limit on file size acts as a disk that fills up in the middle of the record
        "import resource, signal, sys, pathlib\n"
        "from pytest_autoresearch.ledger import Ledger, LedgerError\n"
        "log = Ledger.open(pathlib.Path(sys.argv[1]))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)\n"
        "try:\n    log.append(dict(log.runs[0]))\n"
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


def test_standing_counts_only_the_same_commit_and_machine(path: Path) -> None:
    log = Ledger.open(path)
    for one in [
        baseline(1.0, 1),
        baseline(1.2, 2),
        record(0, 9.0, None, kind="baseline", run=3, commit="b" * 40, fingerprint={"device": "gpu"}),
        record(1, 0.5, "discard"),
        record(2, None, "crash", commit="b" * 40),
    ]:
        log.append(one)
    got = Ledger.open(path).standing("b" * 40, {"versions": ("2.13", 1), "device": "cpu"})
    assert got.scores == (1.0, 1.2)
    assert got.sigma == pytest.approx(0.02**0.5)
    assert got.memory_gb == pytest.approx(44.04)
    assert log.standing("d" * 40, HERE).scores == ()


def test_a_run_that_won_by_being_good_gives_way_to_fresh_ones(path: Path) -> None:
    log = Ledger.open(path)
    log.append(record(1, 0.90, "confirm"))
    assert log.pending() == log.runs[-1]
    assert log.standing("c" * 40, HERE).scores == (0.90,)
    log.append(record(1, 0.95, "keep", kind="confirm", run=2))
    assert log.pending() is None
    got = log.standing("c" * 40, HERE)
    assert got.scores == (0.95,)
    assert got.sigma == pytest.approx(0.05 / 2**0.5)  # it still tells of the noise


def test_confirmations_are_capped(path: Path) -> None:
    log = Ledger.open(path)
    assert log.standing("c" * 40, HERE).may_confirm
    log.append(record(1, 0.9, "discard", kind="confirm", run=2))
    for number in range(2, 13):
        assert not log.standing("c" * 40, HERE).may_confirm  # 2 > 0.15 * (number + 1)
        log.append(record(number))
    log.append(record(13))
    assert log.standing("c" * 40, HERE).may_confirm  # 2 <= 0.15 * 14


def test_results_table() -> None:
    runs = [
        baseline(0.9979, 1),
        record(1, 0.9932, "keep", commit="b2c3d4e" + "0" * 33, description="raise\tthe LR\nto 0.04"),
        record(2, 1.005, "discard", commit="c3d4e5f" + "0" * 33),
        record(3, None, "crash", commit="d4e5f6a" + "0" * 33),
        record(4, 0.9, "confirm", commit="e5f6a7b" + "0" * 33),
        record(4, 0.99, "keep", kind="confirm", run=2, commit="e5f6a7b" + "0" * 33, memory_gb=44.15),
        record(5, 0.9, "confirm"),  # unfinished
    ]
    assert results_tsv(runs, "val_bpb") == (
        "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
        "bbbbbbb\t0.997900\t44.0\tkeep\tbaseline\n"
        "b2c3d4e\t0.993200\t44.0\tkeep\traise the LR to 0.04\n"
        "c3d4e5f\t1.005000\t44.0\tdiscard\twider\n"
        "d4e5f6a\t0.000000\t0.0\tcrash\twider\n"
        "e5f6a7b\t0.990000\t44.1\tkeep\twider\n"
    )
    assert ledger.champion_record(runs) == runs[5]
    assert ledger.champion_record(runs[:1]) == runs[0]
    assert ledger.champion_record([]) is None


@given(st.text(st.characters()))
def test_any_description_is_one_cell_and_one_line(text: str) -> None:
    table = results_tsv([record(description=text)], "val_bpb")
    header, row, end = table.split("\n")
    assert (header.count("\t"), row.count("\t"), end) == (4, 4, "")
    assert len(row.splitlines()) == 1


def test_many_records_append_in_one_write_each(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Ledger.open(path)
    writes: list[bytes] = []
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        writes.append(data)
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    for number in range(1, 4):
        log.append(record(number))
    assert [data.count(b"\n") for data in writes] == [1, 1, 1]
