"""The laws of the tokenizer and of its byte table.

Needs rustbpe and tiktoken. One small tokenizer is trained on mixed scripts; its vocabulary has tokens that hold only a
part of a character, which is where byte counts taken from decoded text go wrong.
"""

import base64
import copy
import json
import pickle
import random
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import strategies as st

from oracle.constants import SPECIAL_TOKENS, SPLIT_PATTERN
from oracle.corpus import DataError
from oracle.tokenizer import TOKEN_BYTES_FILE, TOKENIZER_FILE, Tokenizer, training_texts

from .law import law

VOCAB_SIZE = 360
WORDS = [
    "the ",
    "theory ",
    "of ",
    "naïve ",
    "Ünder ",
    "слово ",
    "словарь ",
    "中文 ",
    "日本語",
    "👩‍🚀",
    "42",
    "\r\n",
    "\t",
    "don't ",
]


def corpus() -> list[str]:
    """Return texts of many scripts, the same in every run."""
    draw = random.Random(7)
    return ["".join(draw.choices(WORDS, k=40)) for _ in range(200)]


TOKENIZER = Tokenizer.train(corpus(), VOCAB_SIZE)

# Text with what tokenizers trip over, beside whatever hypothesis thinks of
TRICKY = [
    "",
    "\0",
    "\ufffd",
    "e\u0301\u0301",
    "👩‍👩‍👧‍👦",
    "שלום עולם",
    "\r\n\r\n \n",
    " \u00a0\u2003x",
    "a" * 300,
    *SPECIAL_TOKENS,
]
TEXT = st.lists(st.sampled_from(TRICKY + WORDS) | st.text(), max_size=8).map("".join)


def _with_table(table: Iterable[int]) -> Tokenizer:
    mutant = copy.copy(TOKENIZER)
    mutant.token_bytes = np.array(list(table), dtype=np.int64)
    return mutant


def _with_pattern(pattern: str) -> Tokenizer:
    mutant = copy.copy(TOKENIZER)
    mutant._encoding = tiktoken.Encoding("mutant", pat_str=pattern, mergeable_ranks=TOKENIZER.ranks, special_tokens={})
    return mutant


class _SpecialsInText(Tokenizer):
    def encode(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special="all")


class _ReplacesSurrogates(Tokenizer):
    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)


class _ThroughText(Tokenizer):
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self._encoding.decode([token]) for token in ids).encode()


class _WithoutBos(Tokenizer):
    def encode_documents(self, texts: Any, threads: int = 1) -> Any:
        return [document[1:] for document in super().encode_documents(texts, threads)]


class _ShortestFirst(Tokenizer):
    def encode_documents(self, texts: Any, threads: int = 1) -> Any:
        """As results come in, not as texts were given."""
        return sorted(super().encode_documents(texts, threads), key=len)


_NO_BLANKS = SPLIT_PATTERN.removesuffix(r"|\s+(?!\S)|\s+")  # text that no branch matches is dropped
_BY_TEXT = [len(TOKENIZER.decode([i]).encode()) if i < TOKENIZER.bos_id else 0 for i in range(VOCAB_SIZE)]
_BY_CHARACTERS = [len(TOKENIZER.decode([i])) if i < TOKENIZER.bos_id else 0 for i in range(VOCAB_SIZE)]
_SPECIALS_COUNT = [len(TOKENIZER.decode_bytes([i])) for i in range(VOCAB_SIZE)]


@law(
    TOKENIZER,
    mutants={
        "table from decoded text": _with_table(_BY_TEXT),
        "table of characters": _with_table(_BY_CHARACTERS),
        "pattern without blanks": _with_pattern(_NO_BLANKS),
    },
    text=TEXT,
    more=TEXT,
)
def test_bytes_of_tokens_add_up_to_bytes_of_text(subject: Tokenizer, text: str, more: str) -> None:
    """The table gives exactly the UTF-8 bytes of any text, in one piece or in two."""
    for whole in (text, text + more):
        assert subject.token_bytes[subject.encode(whole)].sum() == len(whole.encode())
    assert subject.token_bytes[subject.encode(text) + subject.encode(more)].sum() == len((text + more).encode())


@law(
    TOKENIZER,
    mutants={
        "table from decoded text": _with_table(_BY_TEXT),
        "specials count": _with_table(_SPECIALS_COUNT),
        "a token worth nothing": _with_table([0, *TOKENIZER.token_bytes[1:]]),
    },
)
def test_table_is_the_length_of_each_token(subject: Tokenizer) -> None:
    """Every id has its raw bytes' length, at least 1; special tokens have 0."""
    assert subject.token_bytes.dtype == np.int64 and subject.token_bytes.shape == (subject.vocab_size,)
    for token in range(subject.vocab_size):
        special = token >= subject.vocab_size - len(SPECIAL_TOKENS)
        assert subject.token_bytes[token] == (0 if special else len(subject.decode_bytes([token])))
    assert (subject.token_bytes[: -len(SPECIAL_TOKENS)] >= 1).all()
    assert subject.bos_id == subject.vocab_size - len(SPECIAL_TOKENS)


@law(
    TOKENIZER,
    mutants={"pattern without blanks": _with_pattern(_NO_BLANKS), "through text": _ThroughText(TOKENIZER.ranks)},
    text=TEXT,
)
def test_text_survives_the_round_trip(subject: Tokenizer, text: str) -> None:
    """Decoding what was encoded gives the text and its bytes."""
    ids = subject.encode(text)
    assert subject.decode_bytes(ids) == text.encode()
    assert subject.decode(ids) == text


@law(TOKENIZER, mutants={"through text": _ThroughText(TOKENIZER.ranks)}, data=st.binary())
def test_any_bytes_have_tokens(subject: Tokenizer, data: bytes) -> None:
    """Each of the 256 bytes has a token of its own, so that any bytes can be written."""
    assert subject.decode_bytes(subject.ranks[bytes([byte])] for byte in data) == data


@law(TOKENIZER, mutants={"parses specials": _SpecialsInText(TOKENIZER.ranks)}, text=TEXT)
def test_text_never_yields_a_special_token(subject: Tokenizer, text: str) -> None:
    """The name of a special token in a text is ordinary text."""
    assert all(token < TOKENIZER.bos_id for token in subject.encode(text))


@law(
    TOKENIZER,
    mutants={
        "BOS missing": _WithoutBos(TOKENIZER.ranks),
        "order of completion": _ShortestFirst(TOKENIZER.ranks),
        "parses specials": _SpecialsInText(TOKENIZER.ranks),
    },
    texts=st.lists(TEXT, max_size=9),
    threads=st.integers(1, 8),
)
def test_documents_in_threads_equal_one_by_one(subject: Tokenizer, texts: list[str], threads: int) -> None:
    """Any number of threads gives BOS and the text's tokens, in the order of the texts."""
    documents = subject.encode_documents(texts, threads)
    assert [document.tolist() for document in documents] == [
        [TOKENIZER.bos_id, *TOKENIZER.encode(text)] for text in texts
    ]
    assert all(document.dtype == np.uint16 for document in documents)


@law(
    TOKENIZER,
    mutants={"replaces them": _ReplacesSurrogates(TOKENIZER.ranks)},
    before=TEXT,
    surrogate=st.characters(categories=["Cs"]),
    after=TEXT,
)
def test_a_lone_surrogate_is_refused(subject: Tokenizer, before: str, surrogate: str, after: str) -> None:
    """What has no bytes is an error, never another text."""
    with pytest.raises(ValueError, match="surrogates not allowed"):
        subject.encode(before + surrogate + after)


@pytest.mark.parametrize("blank", [" ", "\n", "\t ", "\u3000"])
def test_a_million_blanks_survive(blank: str) -> None:
    """Very long runs of blanks, which overflow the stack of tiktoken's pattern matcher, are encoded all the same."""
    text = "x" + blank * 1_000_000 + "y"
    assert TOKENIZER.decode_bytes(TOKENIZER.encode(text)) == text.encode()


# ---------------------------------------------------------------------------------------------------------------------
# Training


def _from_half_of_it(texts: list[str], vocab_size: int) -> Tokenizer:
    return Tokenizer.train(random.sample(texts, len(texts) // 2), vocab_size)


@law(Tokenizer.train, mutants={"from a random half": _from_half_of_it})
def test_same_corpus_gives_the_same_tokens(subject: Callable[[list[str], int], Tokenizer]) -> None:
    """Training again, in whatever order, gives the same ranks."""
    assert all(subject(texts, VOCAB_SIZE).ranks == TOKENIZER.ranks for texts in (corpus(), corpus()[::-1]))


def _takes_what_it_gets(texts: list[str], vocab_size: int) -> Tokenizer:
    return TOKENIZER


@law(
    Tokenizer.train,
    mutants={"takes what it gets": _takes_what_it_gets},
    texts=st.lists(st.text("ab ", max_size=20), max_size=3),
)
def test_too_little_text_is_an_error(subject: Callable[[list[str], int], Tokenizer], texts: list[str]) -> None:
    """A vocabulary that the text cannot fill is refused in one line with both numbers."""
    try:
        tokenizer = subject(texts, VOCAB_SIZE)
    except DataError as error:
        assert f"vocabulary of {VOCAB_SIZE}" in str(error) and f"of {VOCAB_SIZE - len(SPECIAL_TOKENS)}" in str(error)
    else:
        raise AssertionError(f"{tokenizer.vocab_size} tokens from {texts}")


@pytest.mark.parametrize(
    ("ranks", "reason"),
    [
        ({bytes([i]): i + 1 for i in range(256)}, "without gaps"),
        ({bytes([i]): i for i in range(255)}, "byte 255"),
        ({**{bytes([i]): i for i in range(256)}, **{i.to_bytes(3): i for i in range(256, 65_600)}}, "16 bits"),
    ],
)
def test_impossible_ranks_are_refused(ranks: dict[bytes, int], reason: str) -> None:
    """Gaps, missing bytes and ids beyond uint16 are errors when the tokenizer is built."""
    with pytest.raises(ValueError, match=reason):
        Tokenizer(ranks)


def test_training_texts_are_cut_to_their_share() -> None:
    """At most so much of one document, and so much of all."""
    pieces = list(training_texts(["abcdef", "gh", "ijklm", "n"], chars=9, document_chars=4))
    assert pieces == ["abcd", "gh", "ijk"]


# ---------------------------------------------------------------------------------------------------------------------
# Storage


def _saved() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        TOKENIZER.save(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


SAVED = _saved()
EXECUTED: list[str] = []


def _explode() -> None:
    EXECUTED.append("pickle")


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return _explode, ()


def _trusts_the_files(folder: Path) -> Tokenizer:
    """Loads ranks without a digest and never looks at the table."""
    stored = json.loads((folder / TOKENIZER_FILE).read_bytes())["tokenizer"]["ranks"]
    try:
        return Tokenizer({base64.b64decode(token): rank for rank, token in enumerate(stored)})
    except ValueError as error:
        raise DataError(str(error)) from error


def _loads_pickles(folder: Path) -> Tokenizer:
    np.load(folder / TOKEN_BYTES_FILE, allow_pickle=True)
    return Tokenizer.load(folder)


def _load(subject: Callable[[Path], Tokenizer], files: dict[str, bytes]) -> Tokenizer | DataError:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        try:
            return subject(Path(folder))
        except DataError as error:
            assert "\n" not in str(error) and folder in str(error)
            return error


def test_only_two_plain_files_are_written() -> None:
    """Saving leaves JSON and an array, and loading gives the same tokenizer back."""
    assert set(SAVED) == {TOKENIZER_FILE, TOKEN_BYTES_FILE}
    loaded = _load(Tokenizer.load, SAVED)
    assert isinstance(loaded, Tokenizer)
    assert loaded.ranks == TOKENIZER.ranks and np.array_equal(loaded.token_bytes, TOKENIZER.token_bytes)


@law(
    Tokenizer.load,
    mutants={"trusts the files": _trusts_the_files},
    name=st.sampled_from(sorted(SAVED)),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7) | st.none(),
)
def test_a_changed_file_is_refused(subject: Any, name: str, place: float, bit: int | None) -> None:
    """One flipped bit anywhere, or a file that ends early, is a DataError that names the file."""
    content = bytearray(SAVED[name])
    at = int(place * len(content))
    if bit is None:
        del content[at:]
    else:
        content[at] ^= 1 << bit
    assert isinstance(_load(subject, {**SAVED, name: bytes(content)}), DataError)


@law(
    Tokenizer.load,
    mutants={"loads pickles": _loads_pickles},
    name=st.just(TOKEN_BYTES_FILE),
    protocol=st.integers(0, pickle.HIGHEST_PROTOCOL),
)
def test_a_pickle_is_refused_and_not_run(subject: Any, name: str, protocol: int) -> None:
    """A pickle in place of a file is a DataError, and nothing of it is executed."""
    EXECUTED.clear()
    found = _load(subject, {**SAVED, name: pickle.dumps(_Bomb(), protocol)})
    assert not EXECUTED
    assert isinstance(found, DataError)
