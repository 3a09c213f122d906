"""Prepared data: where it lies, whether it is whole, and which profile is in use."""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from oracle.constants import BOS, CLIMBMIX, PROFILES, SPECIAL_TOKENS, SPLIT_PATTERN, TINY, Profile
from oracle.corpus import DataError, HeldOut, file_digest
from oracle.tokenizer import TOKEN_BYTES_FILE, Tokenizer

SCHEMA = 1  # raise it whenever the same corpus and constants give other files
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A profile's data on disk, complete and unchanged."""

    profile: Profile
    home: Path
    manifest: dict[str, Any]
    seen: dict[str, list[int]] = field(default_factory=dict)  # name -> device, inode, size, times, as it was read

    @classmethod
    def open(cls, profile: Profile, known: Mapping[str, Any] | None = None) -> "Prepared":
        """Find the data of `profile`, read every file and compare its digest.

        With `known`, the `identity` of an earlier time, the digests must be those, and a file that was seen as it is
        now is not read again. Raises DataError naming the file that is missing or changed and what mends it.
        """
        home = data_folder(profile)
        again = f"run `{prepare_command(profile)}`"
        try:
            manifest = read_manifest(home / MANIFEST)
        except FileNotFoundError:
            raise DataError(f"no data is prepared for profile {profile.name} in {home}: {again}") from None
        except ValueError as error:
            raise DataError(f"{home / MANIFEST} is damaged: {again}") from error
        if manifest["schema"] != SCHEMA or manifest["constants"] != data_constants(profile):
            raise DataError(f"{home} was prepared with other constants: {again} to prepare it anew")
        files = manifest["files"]
        if known and {name: entry["sha256"] for name, entry in known.items()} != {
            name: entry["sha256"] for name, entry in files.items()
        }:
            raise DataError(f"{home} was prepared anew since the first run: start again")
        seen = {}
        for name, entry in files.items():
            seen[name] = _seen(home / name)
            if known and seen[name] and known[name]["seen"] == seen[name]:
                continue
            if found := fault(home / name, entry["bytes"], entry["sha256"]):
                raise DataError(f"{home / name} {found}: {again}")
        return cls(profile=profile, home=home, manifest=manifest, seen=seen)

    @property
    def identity(self) -> dict[str, dict[str, Any]]:
        """Return sha256, bytes and what was seen of each file, by name."""
        files = self.manifest["files"].items()
        return {name: {"sha256": e["sha256"], "bytes": e["bytes"], "seen": self.seen[name]} for name, e in files}

    @property
    def command(self) -> str:
        """The command that prepares this data again."""
        return prepare_command(self.profile)

    @property
    def digest(self) -> str:
        """The sha256 of everything here that decides a score: constants, tokenizer, rows and training tokens."""
        digests = {name: entry["sha256"] for name, entry in self.manifest["files"].items()}
        return _digest([self.manifest["constants"], digests])

    @property
    def bos_id(self) -> int:
        """The id that begins every document."""
        return self.profile.vocab_size - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index(BOS)

    def train_shards(self) -> list[npt.NDArray[np.uint16]]:
        """Map the training shards into memory, read-only: uint16 [tokens], each document with BOS in front."""
        names = sorted(name for name in self.manifest["files"] if name.startswith("train-"))
        return [np.load(self.home / name, mmap_mode="r", allow_pickle=False) for name in names]

    def val_rows(self, split: HeldOut = "val") -> npt.NDArray[np.uint16]:
        """Read the packed rows of a held-out split: uint16 [eval_rows, seq_len + 1]."""
        rows: npt.NDArray[np.uint16] = np.load(self.home / f"{split}.npy", allow_pickle=False)
        return rows

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Read how many bytes each token stands for: int64 [V], specials 0."""
        table: npt.NDArray[np.int64] = np.load(self.home / TOKEN_BYTES_FILE, allow_pickle=False)
        return table

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer."""
        return Tokenizer.load(self.home)


def cache_folder() -> Path:
    """Return where data is kept: AUTORESEARCH_CACHE, else ~/.cache/autoresearch."""
    return Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch").absolute()


def data_folder(profile: Profile) -> Path:
    """Return the folder of a profile's data."""
    return cache_folder() / profile.name


def prepare_command(profile: Profile) -> str:
    """Return the command line that prepares a profile."""
    return f"python -m oracle.prepare --profile {profile.name}"


def default_profile() -> Profile:
    """Return climbmix where it is prepared and a CUDA GPU is there, else tiny."""
    if (data_folder(CLIMBMIX) / MANIFEST).is_file():
        import torch

        if torch.cuda.is_available():
            return CLIMBMIX
    return TINY


def active_profile() -> Profile:
    """Return the profile that AUTORESEARCH_PROFILE names, else the default one; raise DataError for an unknown name."""
    name = os.environ.get("AUTORESEARCH_PROFILE")
    return named_profile(name, "AUTORESEARCH_PROFILE") if name else default_profile()


def profile_name() -> str:
    """Return the name of the active profile; end the program with one line where there is no such profile."""
    try:
        return active_profile().name
    except DataError as error:  # train.py asks at import, outside of any handler
        sys.exit(f"error: {error}")


def signed(record: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest with the sha256 of its own content."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    return {**content, "sha256": _digest(content)}


def read_manifest(path: Path) -> dict[str, Any]:
    """Read what `signed` made; raise ValueError for anything else and OSError where it cannot be read."""
    record = json.loads(path.read_bytes())
    if not isinstance(record, dict) or record != signed(record):
        raise ValueError(f"{path} is no manifest or was changed")
    return record


def data_constants(profile: Profile) -> dict[str, Any]:
    """Return what prepared data depends on, as JSON."""
    kept = ("name", "seq_len", "vocab_size", "eval_rows", "tokenizer_chars", "tokenizer_document_chars")
    fields = {key: value for key, value in asdict(profile).items() if key in kept}
    return {**fields, "split_pattern": SPLIT_PATTERN, "special_tokens": list(SPECIAL_TOKENS)}


def fault(path: Path, size: int, digest: str) -> str | None:
    """Say what is wrong with a file that should have `size` bytes and this sha256; None where nothing is."""
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != size:
        return f"is damaged (it has {path.stat().st_size} bytes, not {size})"
    if file_digest(path) != digest:
        return "is damaged (its sha256 is not the manifest's)"
    return None


def _seen(path: Path) -> list[int]:
    """Return what the file system knows of a file and changes whenever the file does; nothing where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return []
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def named_profile(name: str, source: str) -> Profile:
    if name not in PROFILES:
        raise DataError(f"unknown profile {name!r} from {source}: choose {' or '.join(PROFILES)}")
    return PROFILES[name]
