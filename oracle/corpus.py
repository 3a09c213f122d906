"""Where documents come from: a pinned wheel (tiny), downloaded shards (climbmix), or a folder of the user's own.

Every corpus gives two held-out splits and training documents in parts. No text of a held-out split is in another
split: splits are told apart by what a document says, never by the name of its file.
"""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from functools import cached_property
from html.parser import HTMLParser
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol

HeldOut = Literal["val", "heldout"]
HELD_OUT: tuple[HeldOut, ...] = ("val", "heldout")

WHEEL = "botocore==1.43.11"  # Apache-2.0
WHEEL_FILE = "botocore-1.43.11-py3-none-any.whl"
WHEEL_SHA256 = "0108b5604df5a26918936c845e1e761866ee9ea8d1c1f9358ed3c69afdc37436"
MIN_CHARS = 80  # shorter documentation strings are boilerplate
# Whole services, without siblings among the others, so that held-out text is about things never trained on
WHEEL_SERVICES: dict[HeldOut, frozenset[str]] = {
    "val": frozenset({"batch", "codecommit", "kendra", "transcribe"}),
    "heldout": frozenset({"eks", "fsx", "rekognition", "stepfunctions"}),
}

CLIMBMIX_URL = "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main/"
CLIMBMIX_SHARDS = 6_541  # shards 0..6540 may be trained on
CLIMBMIX_HELD_OUT: dict[HeldOut, int] = {"val": 6_542, "heldout": 6_541}  # never trained on

PART_BYTES = 256_000_000  # text of a folder that is held in memory at once
FEWEST_BYTES = 2  # a token of a user's text: with less than this no folder can serve
MOST_BYTES = 8  # a token: held back for a split at first, where there is that much


class DataError(Exception):
    """Say in one line what is wrong with a corpus or with prepared data, and what to do about it."""


class Corpus(Protocol):
    """Documents in three splits."""

    identity: dict[str, Any]  # JSON; equal identities mean equal documents
    splits_long: bool  # a document longer than a row goes on in the next row instead of losing its tail

    def tokenizer_texts(self) -> Iterable[str]:
        """Return documents that are in no held-out split, in a fixed order."""

    def held_out(self, split: HeldOut) -> Iterable[str]:
        """Return the documents of a held-out split, in a fixed order, each text once."""

    def packed(self, split: HeldOut, documents: int) -> None:
        """Take note that packing read so many documents of a split: the others of it may go elsewhere.

        val comes before heldout, and both come before the training parts are asked for.
        """

    @property
    def parts(self) -> int:
        """The number of training parts, each one prepared at a time."""

    def part(self, index: int) -> Iterable[str]:
        """Return the training documents of one part, in a fixed order."""


class WheelCorpus:
    """Every documentation string of the wheel's service models as plain text, each text once."""

    parts = 1
    splits_long = False

    def __init__(self, wheel: Path, services: dict[HeldOut, frozenset[str]] = WHEEL_SERVICES) -> None:
        """Read all documents of `wheel`; held-out services win where a text occurs in several splits."""
        splits: dict[str, dict[str, None]] = {"val": {}, "heldout": {}, "train": {}}
        for service, text in wheel_documents(wheel):
            split = next((name for name in HELD_OUT if service in services[name]), "train")
            splits[split][text] = None
        for split in ("heldout", "train"):
            for text in splits["val"]:
                splits[split].pop(text, None)
        for text in splits["heldout"]:
            splits["train"].pop(text, None)
        self._documents = {name: sorted(texts, key=text_digest) for name, texts in splits.items()}
        self.identity = {"kind": "wheel", "sha256": file_digest(wheel)}

    def tokenizer_texts(self) -> list[str]:
        """Return all training documents."""
        return self._documents["train"]

    def held_out(self, split: HeldOut) -> list[str]:
        """Return the documents of the services held out for `split`."""
        return self._documents[split]

    def packed(self, split: HeldOut, documents: int) -> None:
        """Hold the rest of a split out too."""

    def part(self, index: int) -> list[str]:
        """Return all training documents, in the order of their digests."""
        return self._documents["train"]


class ShardCorpus:
    """Downloaded parquet shards in their own, already shuffled order: one training part a shard."""

    splits_long = False

    def __init__(self, training: list[Path], held_out: dict[HeldOut, Path]) -> None:
        """Take shards that lie on disk."""
        self._training = training
        self._held_out = held_out
        self.parts = len(training)
        files = [*training, *held_out.values()]
        digests = {path.name: file_digest(path) for path in files}
        self.identity = {"kind": "climbmix", "training_shards": self.parts, "files": digests}

    @cached_property
    def _digests(self) -> dict[HeldOut, set[bytes]]:
        return {split: set(map(text_digest, parquet_texts(path))) for split, path in self._held_out.items()}

    def tokenizer_texts(self) -> Iterator[str]:
        """Yield the documents of all training shards."""
        return (text for index in range(self.parts) for text in self.part(index))

    def held_out(self, split: HeldOut) -> Iterator[str]:
        """Yield the documents of the split's shard; what val has too is left out of heldout."""
        seen = set() if split == "val" else set(self._digests["val"])
        return _unseen(parquet_texts(self._held_out[split]), seen)

    def packed(self, split: HeldOut, documents: int) -> None:
        """Hold the rest of a split out too."""

    def part(self, index: int) -> Iterator[str]:
        """Yield the documents of one shard that no held-out shard has."""
        seen = self._digests["val"] | self._digests["heldout"]
        return _unseen(parquet_texts(self._training[index]), seen)


class FolderCorpus:
    """A folder of the user's own: a document is a text file or a row of a parquet file.

    Documents are put in the order of their digests, so that neither names nor places of files decide. The first ones
    are held back, and the tokenizer never sees them: val is packed from the beginning, heldout from where packing val
    stopped, and what neither has read comes first in training.
    """

    splits_long = True

    def __init__(self, folder: Path, *, held_out_tokens: int, part_bytes: int = PART_BYTES) -> None:
        """Read all of `folder`; hold back enough for two splits of `held_out_tokens`, a third of the text each at most.

        Raises DataError for a folder that is missing, empty, too small, or holds a file that is no text.
        """
        self._folder = folder
        self._part_bytes = part_bytes
        self._sizes: dict[bytes, int] = {}
        self._files: dict[bytes, Path] = {}  # one that holds the document
        for path, text in folder_documents(folder):
            content = text.encode()
            digest = hashlib.sha256(content).digest()
            self._sizes[digest] = len(content)
            self._files[digest] = path
        if not self._sizes:
            raise DataError(f"{folder} holds no documents: put text files or *.parquet with a `text` column there")
        total = sum(self._sizes.values())
        fewest = 3 * FEWEST_BYTES * held_out_tokens
        if total < fewest:
            raise DataError(
                f"{folder} holds {total / 1e6:.1f} MB of distinct text, too little for this profile: it needs at least "
                f"{fewest / 1e6:.1f} MB, a third each for val, for the second split and for training"
            )
        self._order = sorted(self._sizes)
        ends = list(accumulate(self._sizes[digest] for digest in self._order))
        share = min(total // 3, MOST_BYTES * held_out_tokens)
        val, held_back = (bisect_left(ends, size) + 1 for size in (share, 2 * share))
        if not val < held_back < len(self._order):
            raise DataError(f"{folder} has too few documents to hold some out: split its files into smaller ones")
        self._ends = {"val": val, "heldout": held_back}
        self._starts = {"val": 0, "heldout": val, "train": held_back}  # the last two move as packing stops sooner
        together = hashlib.sha256(b"".join(self._order))
        self.identity = {"kind": "folder", "sha256": together.hexdigest(), "held_back": held_back}

    def tokenizer_texts(self) -> Iterator[str]:
        """Yield the documents that were not held back."""
        return self._texts(self._sliced(self._order[self._ends["heldout"] :]))

    def held_out(self, split: HeldOut) -> Iterator[str]:
        """Yield the documents that a split may be packed from."""
        return self._texts(self._sliced(self._order[self._starts[split] : self._ends[split]]))

    def packed(self, split: HeldOut, documents: int) -> None:
        """Let the next split, or training, begin after the documents that packing read."""
        self._starts["heldout" if split == "val" else "train"] = self._starts[split] + documents

    @property
    def parts(self) -> int:
        """The number of training parts."""
        return len(self._training())

    def part(self, index: int) -> Iterator[str]:
        """Yield the training documents of one part."""
        return self._texts([self._training()[index]])

    def _training(self) -> list[list[bytes]]:
        return self._sliced(self._order[self._starts["train"] :])

    def _sliced(self, digests: list[bytes]) -> list[list[bytes]]:
        """Cut `digests` into slices of which each is about what may be in memory at once."""
        count = min(len(digests), 1 + sum(self._sizes[digest] for digest in digests) // self._part_bytes)
        return [digests[len(digests) * i // count : len(digests) * (i + 1) // count] for i in range(count)]

    def _texts(self, slices: list[list[bytes]]) -> Iterator[str]:
        for digests in slices:
            wanted = set(digests)
            paths = sorted({self._files[digest] for digest in digests})
            texts = (text for path in paths for text in _file_texts(path))
            found = {digest: text for text in texts if (digest := text_digest(text)) in wanted}
            if len(found) < len(wanted):
                raise DataError(f"{self._folder} changed while it was read: run the same command again")
            yield from (found[digest] for digest in digests)


def text_digest(text: str) -> bytes:
    """Return the sha256 of a document's UTF-8 bytes: what tells documents apart and orders them."""
    return hashlib.sha256(text.encode()).digest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_wheel(path: Path) -> Path:
    """Return `path` if it is the pinned wheel; raise DataError if it is missing or has other bytes."""
    if not path.is_file():
        raise DataError(f"{path} does not exist: give the path of {WHEEL_FILE}")
    if (found := file_digest(path)) != WHEEL_SHA256:
        raise DataError(f"{path} is not the pinned {WHEEL_FILE}: its sha256 is {found}, not {WHEEL_SHA256}")
    return path


def fetch_wheel(folder: Path) -> Path:
    """Return the pinned wheel in `folder`, fetched with pip where it is missing or damaged."""
    path = folder / WHEEL_FILE
    if path.is_file() and file_digest(path) == WHEEL_SHA256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        quiet = ["--quiet", "--disable-pip-version-check", "--no-cache-dir"]
        command = [sys.executable, "-m", "pip", "download", "--no-deps", *quiet, "-d", scratch, WHEEL]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode or not (Path(scratch) / WHEEL_FILE).is_file():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise DataError(
                f"pip could not fetch {WHEEL} ({last}): mend the registry, or fetch {WHEEL_FILE} elsewhere "
                "and pass --wheel PATH"
            )
        os.replace(check_wheel(Path(scratch) / WHEEL_FILE), path)
    return path


def wheel_documents(wheel: Path) -> Iterator[tuple[str, str]]:
    """Yield (service, plain text) of every long enough documentation string, duplicates included."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            match name.split("/"):
                case ["botocore", "data", service, _, "service-2.json" | "service-2.json.gz"]:
                    packed = archive.read(name)
                    model = json.loads(gzip.decompress(packed) if name.endswith(".gz") else packed)
                    for html in _documentation(model):
                        # Tags only shorten, so that most strings need no parser
                        if len(html) >= MIN_CHARS and len(text := plain_text(html)) >= MIN_CHARS:
                            yield service, text


def plain_text(html: str) -> str:
    """Strip the tags of `html`, resolve its entities and collapse blanks."""
    pieces: list[str] = []
    parser = HTMLParser(convert_charrefs=True)
    parser.handle_data = pieces.append  # type: ignore[method-assign,assignment]
    parser.feed(html)
    parser.close()
    return " ".join("".join(pieces).split())


def folder_documents(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield (file, text) of each text file and parquet row below `folder` that is not blank; hidden names are left out.

    Raises DataError that names the file for what is neither text nor parquet with a `text` column.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give --corpus a folder of text or parquet files")
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            path = Path(parent) / name
            yield from ((path, text) for text in _file_texts(path) if text.strip())


def parquet_texts(path: Path) -> Iterator[str]:
    """Yield column `text` of a parquet file, one row group in memory at a time; nulls are left out."""
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise DataError(f"{path} has no column `text`, only {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(columns=["text"], batch_size=1_024):
                for text in batch.column(0).to_pylist():
                    if text is not None:
                        if not isinstance(text, str):
                            raise DataError(f"{path} has a column `text` that holds {type(text).__name__}, not text")
                        yield text
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} cannot be read as parquet ({reason}): remove it and run again") from error


def _file_texts(path: Path) -> Iterator[str]:
    if path.suffix == ".parquet":
        yield from parquet_texts(path)
        return
    try:
        yield path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not text (byte {error.start} is no UTF-8): move it out of the corpus folder"
        ) from error


def _documentation(model: object) -> Iterator[str]:
    if isinstance(model, dict):
        for key, value in model.items():
            if key == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _documentation(value)
    elif isinstance(model, list):
        for value in model:
            yield from _documentation(value)


def _unseen(texts: Iterable[str], seen: set[bytes]) -> Iterator[str]:
    for text in texts:
        if text.strip() and (digest := text_digest(text)) not in seen:
            seen.add(digest)
            yield text
