"""The laws of packing and of the training stream (documents to rows to batches).

Needs numpy only. Documents are drawn as lengths; token 0 is BOS and every other token occurs once in all documents, so
that a token says which document it is from and where.
"""

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from oracle import dataloader
from oracle.constants import BUFFER_DOCUMENTS, TINY
from oracle.corpus import DataError
from oracle.dataloader import train_batches, train_rows
from oracle.packing import Tokens, pack
from oracle.prepared import Prepared

from .law import law
from .packing_reference import best_fit, naive_pack

BOS = 0
LENGTHS = st.lists(st.integers(1, 30), max_size=40)
ROW_LEN = st.integers(1, 12)
BUFFER = st.integers(1, 8)

Packer = Callable[[Iterable[Tokens], int, int], Iterator[Tokens]]


def documents_of(lengths: Sequence[int]) -> list[Tokens]:
    """Return one document a length: BOS, then tokens that no other document has."""
    documents, fresh = [], 1
    for length in lengths:
        documents.append(np.array([BOS, *range(fresh, fresh + length - 1)], dtype=np.uint16))
        fresh += length - 1
    return documents


def segments(row: Tokens) -> list[tuple[int, ...]]:
    """Cut a row before every BOS."""
    starts = [0, *(int(at) for at in np.flatnonzero(row == BOS) if at)]
    return [tuple(row[start:end].tolist()) for start, end in zip(starts, [*starts[1:], len(row)], strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Planted bugs


def _newest_of_equals(lengths: Sequence[int], room: int) -> int:
    chosen = lengths[best_fit(lengths, room)]
    return len(lengths) - 1 - list(lengths)[::-1].index(chosen)


def _crop_longest(lengths: Sequence[int], room: int) -> int:
    return best_fit(lengths, room) if min(lengths) <= room else lengths.index(max(lengths))


def _first_fit(lengths: Sequence[int], room: int) -> int:
    return next((index for index, length in enumerate(lengths) if length <= room), lengths.index(min(lengths)))


def _next_in_line(lengths: Sequence[int], room: int) -> int:
    return 0


def _choosing(choose: Callable[[Sequence[int], int], int]) -> Packer:
    return lambda documents, row_len, buffer_size: naive_pack(documents, row_len, buffer_size, choose)


def _refilled_once_a_row(documents: Iterable[Tokens], row_len: int, buffer_size: int) -> Iterator[Tokens]:
    incoming = iter(documents)
    buffer: list[Tokens] = []
    row: list[Tokens] = []
    room = row_len
    while True:
        if room == row_len or not buffer:
            buffer += islice(incoming, buffer_size - len(buffer))
        if not buffer:
            return
        row.append(buffer.pop(best_fit([len(held) for held in buffer], room))[:room])
        room -= len(row[-1])
        if not room:
            yield np.concatenate(row)
            row, room = [], row_len


def _tails_come_again(documents: Iterable[Tokens], row_len: int, buffer_size: int) -> Iterator[Tokens]:
    """A plain stream cut into rows: what one row cuts off begins the next."""
    stream = np.concatenate([*documents, np.zeros(0, dtype=np.uint16)])
    for start in range(0, len(stream) - row_len + 1, row_len):
        yield stream[start : start + row_len]


def _padded(documents: Iterable[Tokens], row_len: int, buffer_size: int) -> Iterator[Tokens]:
    for document in documents:
        yield np.pad(document[:row_len], (0, max(0, row_len - len(document))), constant_values=65_535)


def _ragged_end(documents: Iterable[Tokens], row_len: int, buffer_size: int) -> Iterator[Tokens]:
    documents = list(documents)
    yield from naive_pack(documents, row_len, buffer_size)
    yield np.concatenate([*documents, np.zeros(1, dtype=np.uint16)])[: row_len - 1]


def _one_too_many(documents: Iterable[Tokens], row_len: int, buffer_size: int) -> Iterator[Tokens]:
    documents = list(documents)
    return naive_pack([*documents, *documents[:1]], row_len, buffer_size)


def _loses_documents(documents: Iterable[Tokens], row_len: int, buffer_size: int) -> Iterator[Tokens]:
    return naive_pack(islice(documents, 0, None, 2), row_len, buffer_size)


def _reused_row(documents: Iterable[Tokens], row_len: int, buffer_size: int) -> Iterator[Tokens]:
    shared = np.empty(row_len, dtype=np.uint16)
    for row in naive_pack(documents, row_len, buffer_size):
        shared[:] = row
        yield shared


# ---------------------------------------------------------------------------------------------------------------------
# Packing


@law(
    pack,
    mutants={
        "pads": _padded,
        "ragged end": _ragged_end,
        "tails come again": _tails_come_again,
        "int64": lambda *a: (row.astype(np.int64) for row in naive_pack(*a)),
    },
    lengths=LENGTHS,
    row_len=ROW_LEN,
    buffer_size=BUFFER,
)
def test_rows_are_full_and_begin_with_bos(subject: Packer, lengths: list[int], row_len: int, buffer_size: int) -> None:
    """Every row has row_len tokens of documents, no padding, BOS first, as uint16."""
    documents = documents_of(lengths)
    known = {token for document in documents for token in document.tolist()}
    for row in subject(documents, row_len, buffer_size):
        assert row.shape == (row_len,) and row.dtype == np.uint16
        assert row[0] == BOS
        assert known.issuperset(row.tolist())


@law(
    pack,
    mutants={
        "tails come again": _tails_come_again,
        "crops before the end": _padded,
        "scrambles": lambda *a: (np.sort(row) for row in naive_pack(*a)),
    },
    lengths=LENGTHS,
    row_len=ROW_LEN,
    buffer_size=BUFFER,
)
def test_only_the_last_document_of_a_row_is_cropped(
    subject: Packer, lengths: list[int], row_len: int, buffer_size: int
) -> None:
    """A stretch between BOS tokens is a whole document, or the beginning of one at the row's end."""
    documents = [tuple(document.tolist()) for document in documents_of(lengths)]
    beginnings = {document[:end] for document in documents for end in range(1, len(document) + 1)}
    for row in subject(documents_of(lengths), row_len, buffer_size):
        *whole, last = segments(row)
        assert set(documents).issuperset(whole)
        assert last in beginnings


@law(
    pack,
    mutants={"one document twice": _one_too_many, "loses documents": _loses_documents, "pads": _padded},
    lengths=LENGTHS,
    row_len=ROW_LEN,
    buffer_size=BUFFER,
)
def test_no_document_is_lost_or_repeated(subject: Packer, lengths: list[int], row_len: int, buffer_size: int) -> None:
    """Documents placed and documents held are those read; in the end less than one row stays unplaced."""
    documents = documents_of(lengths)
    read = 0

    def reading() -> Iterator[Tokens]:
        nonlocal read
        for document in documents:
            read += 1
            yield document

    placed: Counter[tuple[int, ...]] = Counter()
    for row in subject(reading(), row_len, buffer_size):
        placed.update(segment[:2] for segment in segments(row))
        if read < len(documents):  # the buffer was full before the last choice
            assert read == placed.total() + buffer_size - 1
    # A document cropped to its BOS shows no token of its own: match those by number
    whole = Counter(tuple(document[:2].tolist()) for document in documents)
    bare = placed.pop((BOS,), 0)
    assert placed <= whole
    left = whole - placed
    assert bare <= left.total()
    if lengths and bare == 0:
        unplaced = sum(len(document) for document in documents if tuple(document[:2].tolist()) in left)
        assert unplaced < row_len


@law(
    pack,
    mutants={
        "newest of equals": _choosing(_newest_of_equals),
        "crops the longest": _choosing(_crop_longest),
        "first fit": _choosing(_first_fit),
        "next in line": _choosing(_next_in_line),
        "refills once a row": _refilled_once_a_row,
        "buffer one short": lambda documents, row_len, size: naive_pack(documents, row_len, max(1, size - 1)),
    },
    lengths=LENGTHS,
    row_len=ROW_LEN,
    buffer_size=BUFFER,
)
def test_rows_equal_the_definition(subject: Packer, lengths: list[int], row_len: int, buffer_size: int) -> None:
    """The fast packer chooses what the naive definition chooses, row for row."""
    documents = documents_of(lengths)
    rows = [row.tolist() for row in subject(documents, row_len, buffer_size)]
    assert rows == [row.tolist() for row in naive_pack(documents, row_len, buffer_size)]


@law(
    pack,
    mutants={"one row for all": _reused_row},
    lengths=LENGTHS,
    row_len=ROW_LEN,
    buffer_size=BUFFER,
)
def test_a_row_stays_as_it_was_yielded(subject: Packer, lengths: list[int], row_len: int, buffer_size: int) -> None:
    """No later row changes one that was handed out, and rows share nothing with the documents."""
    documents = documents_of(lengths)
    held, copies = [], []
    for row in subject(documents, row_len, buffer_size):
        held.append(row)
        copies.append(row.copy())
    for document in documents:
        document[:] = 7
    assert all(np.array_equal(row, copy) for row, copy in zip(held, copies, strict=True))


@pytest.mark.parametrize(("row_len", "buffer_size"), [(0, 1), (1, 0)])
def test_impossible_sizes_are_refused(row_len: int, buffer_size: int) -> None:
    """Sizes that could never give a row are an error, not an endless loop."""
    with pytest.raises(ValueError, match="at least 1"):
        next(pack([[BOS]], row_len, buffer_size))


def test_an_empty_document_is_refused() -> None:
    """A document without tokens is an error, not an endless loop."""
    with pytest.raises(ValueError, match="without tokens"):
        next(pack([[]], 4, 2))


# ---------------------------------------------------------------------------------------------------------------------
# The training stream

PROFILE = replace(TINY, name="mini", seq_len=8, vocab_size=4_004)
SHARDS = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), min_size=1, max_size=3)

Rows = Callable[[Prepared, int], Iterator[tuple[Tokens, int]]]
Batches = Callable[[Prepared, int, int], Iterator[tuple[Tokens, int]]]


class PreparedShards:
    """Token shards on disk, without a corpus behind them; BOS is the profile's."""

    def __init__(self, shards: Sequence[Sequence[int]]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        home = Path(self._folder.name)
        files: dict[str, Any] = {}
        self.prepared = Prepared(profile=PROFILE, home=home, manifest={"files": files})
        documents = iter(documents_of([length for shard in shards for length in shard]))
        for index, shard in enumerate(shards):
            tokens = np.concatenate([np.zeros(0, dtype=np.uint16), *(next(documents) for _ in shard)])
            tokens[tokens == BOS] = self.prepared.bos_id
            files[f"train-{index:05}.npy"] = {}
            np.save(home / f"train-{index:05}.npy", tokens)

    def __enter__(self) -> Prepared:
        return self.prepared

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def _packs_each_batch_anew(prepared: Prepared, batch_size: int, seq_len: int) -> Iterator[tuple[Tokens, int]]:
    """The row that a batch boundary cuts is lost: rows depend on the batch size."""
    rows = train_rows(prepared, seq_len)
    while True:
        batch = list(islice(rows, batch_size))
        next(rows)
        yield np.stack([row for row, _ in batch]), batch[-1][1]


def _one_array_for_all(prepared: Prepared, batch_size: int, seq_len: int) -> Iterator[tuple[Tokens, int]]:
    shared = np.empty((batch_size, seq_len + 1), dtype=np.uint16)
    rows = train_rows(prepared, seq_len)
    while True:
        for index, (row, _) in enumerate(islice(rows, batch_size)):
            shared[index] = row
        yield shared, 0


@law(
    train_batches,
    mutants={"packs each batch anew": _packs_each_batch_anew},
    shards=SHARDS,
    batch_size=st.integers(1, 16),
    seq_len=st.integers(1, 9),
)
def test_the_stream_does_not_depend_on_the_batch_size(
    subject: Batches, shards: list[list[int]], batch_size: int, seq_len: int
) -> None:
    """Batches of any size, laid end to end, are the same rows."""
    with PreparedShards(shards) as prepared:
        batches = subject(prepared, batch_size, seq_len)
        rows = np.concatenate([batch for batch, _ in islice(batches, 3)])
        batches.close()  # type: ignore[attr-defined]
        assert np.array_equal(rows, [row for row, _ in islice(train_rows(prepared, seq_len), len(rows))])


@law(
    train_batches,
    mutants={"one array for all": _one_array_for_all},
    shards=SHARDS,
    batch_size=st.integers(1, 4),
)
def test_a_batch_stays_as_it_was_yielded(subject: Batches, shards: list[list[int]], batch_size: int) -> None:
    """No later batch changes one that was handed out."""
    with PreparedShards(shards) as prepared:
        batches = subject(prepared, batch_size, 8)
        held = [batch for batch, _ in islice(batches, 12)]
        batches.close()  # type: ignore[attr-defined]
        rows = np.array([row for row, _ in islice(train_rows(prepared, 8), 12 * batch_size)])
        assert np.array_equal(np.concatenate(held), rows)


def _counts_down(prepared: Prepared, seq_len: int) -> Iterator[tuple[Tokens, int]]:
    return ((row, -epoch) for row, epoch in train_rows(prepared, seq_len))


def _forgets_the_second_pass(prepared: Prepared, seq_len: int) -> Iterator[tuple[Tokens, int]]:
    return ((row, 0) for row, _ in train_rows(prepared, seq_len))


def _shuffles(prepared: Prepared, seq_len: int) -> Iterator[tuple[Tokens, int]]:
    order = np.random.default_rng()  # without a seed
    return ((order.permutation(row), epoch) for row, epoch in train_rows(prepared, seq_len))


@law(
    train_rows,
    mutants={
        "counts down": _counts_down,
        "forgets the second pass": _forgets_the_second_pass,
        "shuffles without a seed": _shuffles,
    },
    shards=SHARDS,
    seq_len=st.integers(1, 9),
)
def test_passes_repeat_in_the_same_order(subject: Rows, shards: list[list[int]], seq_len: int) -> None:
    """The stream is the packing of the shards over and over; its epoch never falls and tells how far it has read."""
    with PreparedShards(shards) as prepared:
        documents = documents_of([length for shard in shards for length in shard])
        for document in documents:
            document[0] = prepared.bos_id
        read = 0

        def endless() -> Iterator[Tokens]:
            nonlocal read
            while True:
                for document in documents:
                    read += 1
                    yield document

        expected = pack(endless(), seq_len + 1)
        last = 0
        for row, epoch in islice(subject(prepared, seq_len), 60):
            assert np.array_equal(row, next(expected))
            assert epoch >= last
            assert epoch == (read - 1) // len(documents)
            last = epoch


def _ends_quietly(prepared: Prepared, seq_len: int) -> Iterator[tuple[Tokens, int]]:
    yield from ()


@law(
    train_rows,
    mutants={"ends quietly": _ends_quietly},
    shards=st.lists(st.just([]), max_size=2),
    seq_len=st.integers(1, 9),
)
def test_no_document_is_an_error(subject: Rows, shards: list[list[int]], seq_len: int) -> None:
    """Shards without a document raise; they neither hang nor end the stream."""
    with PreparedShards(shards) as prepared:
        try:
            rows = list(islice(subject(prepared, seq_len), 1))
        except DataError as error:
            assert "no training document" in str(error)
        else:
            raise AssertionError(f"{len(rows)} rows from nothing")


@pytest.mark.parametrize("block", [1, 2, 3, 7, 50])
def test_the_stream_does_not_depend_on_how_shards_are_read(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that begin, end or go on where a block does are the same documents."""
    with PreparedShards([[5, 9, 1, 30, 3], [1], [7, 7, 14]]) as prepared:
        expected = [row.tolist() for row, _ in islice(train_rows(prepared, 8), 40)]
        monkeypatch.setattr(dataloader, "_BLOCK", block)
        assert [row.tolist() for row, _ in islice(train_rows(prepared, 8), 40)] == expected


def test_the_first_row_does_not_wait_for_a_whole_shard(tmp_path: Path) -> None:
    """Of a shard of 4 GB, a hole but for its beginning, only the beginning is read."""
    prepared = Prepared(profile=PROFILE, home=tmp_path, manifest={"files": {"train-00000.npy": {}}})
    shard = np.lib.format.open_memmap(tmp_path / "train-00000.npy", "w+", np.uint16, (1 << 31,))
    shard[: 4 * BUFFER_DOCUMENTS : 2] = prepared.bos_id
    del shard
    began = time.monotonic()
    row, epoch = next(train_rows(prepared, 8))
    assert epoch == 0 and len(row) == 9 and time.monotonic() - began < 5


def test_closing_the_stream_ends_its_thread() -> None:
    """After close() nothing goes on making batches."""
    with PreparedShards([[5, 9]]) as prepared:
        batches = train_batches(prepared, 2, 8)
        next(batches)
        batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "train-batches"]


def test_an_error_of_the_thread_reaches_the_reader() -> None:
    """What goes wrong while batches are made ahead is raised where they are taken."""
    with PreparedShards([[]]) as prepared, pytest.raises(DataError, match="no training document"):
        next(train_batches(prepared, 2, 8))
