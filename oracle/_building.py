"""One preparation in progress: which files are complete, written down so that it can go on after an interruption."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from oracle.constants import Profile
from oracle.corpus import Corpus, DataError, HeldOut, file_digest
from oracle.packing import Tokens
from oracle.prepared import MANIFEST, SCHEMA, Prepared, data_constants, data_folder, fault, read_manifest, signed

_BUILDING = "building.json"


class Building:
    """The manifest of a preparation while files are still missing."""

    def __init__(self, profile: Profile, record: dict[str, Any]) -> None:
        self.home = data_folder(profile)
        self._profile = profile
        self._record = record

    @classmethod
    @contextmanager
    def begin(cls, profile: Profile, corpus: Corpus) -> Iterator["Building"]:
        """Go on with what an earlier preparation of the same corpus left, alone until the block ends.

        Raises DataError while another process prepares the same profile.
        """
        home = data_folder(profile)
        home.mkdir(parents=True, exist_ok=True)
        with (home / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{home} is being prepared by another process: wait for it to end") from None
            fresh = {
                "schema": SCHEMA,
                "profile": profile.name,
                "corpus": corpus.identity,
                "vocab_size": profile.vocab_size,
                "constants": data_constants(profile),
                "counts": {},
                "files": {},
            }
            record = recorded(home)
            identity = ("schema", "corpus", "constants")
            (home / MANIFEST).unlink(missing_ok=True)
            if any(record.get(key) != fresh[key] for key in identity):
                record = fresh
                for stale in home.glob("*.npy"):
                    stale.unlink()
            building = cls(profile, record)
            building._write(_BUILDING)
            yield building

    def lacks(self, name: str) -> bool:
        """Tell whether a file is missing, damaged or was never finished."""
        entry = self._record["files"].get(name)
        return entry is None or fault(self.home / name, entry["bytes"], entry["sha256"]) is not None

    def add_base(self, *names: str) -> None:
        """Record files that all others depend on; forget the others if these are not what they were."""
        before = self._record["files"]
        entries = {name: self._entry(name) for name in names}
        if any(before.get(name) != entry for name, entry in entries.items()):
            self._record |= {"files": {}, "counts": {}}
        self._record["files"] |= entries
        self._write(_BUILDING)

    def packed(self, split: HeldOut) -> int:
        """Return how many documents packing read for a split; 0 where the data is older than this record."""
        return int(self._record["counts"][f"{split}.npy"].get("packed", 0))

    def save(self, name: str, tokens: Tokens, bos_id: int, **counts: int) -> None:
        """Write an array of tokens and record it, with the caller's own counts."""
        staged = self.home / f"{name}.tmp"
        with staged.open("wb") as file:
            np.save(file, tokens, allow_pickle=False)
        os.replace(staged, self.home / name)
        self._record["files"][name] = self._entry(name)
        documents = int(np.count_nonzero(tokens == bos_id))
        self._record["counts"][name] = {"documents": documents, "tokens": int(tokens.size), **counts}
        self._write(_BUILDING)

    def finish(self) -> Prepared:
        """Write the manifest: everything is there."""
        self._write(MANIFEST)
        (self.home / _BUILDING).unlink()
        return Prepared(profile=self._profile, home=self.home, manifest=self._record)

    def _entry(self, name: str) -> dict[str, Any]:
        path = self.home / name
        return {"sha256": file_digest(path), "bytes": path.stat().st_size}

    def _write(self, name: str) -> None:
        staged = self.home / f"{name}.tmp"
        staged.write_text(json.dumps(signed(self._record), indent=1) + "\n")
        os.replace(staged, self.home / name)


def recorded(home: Path) -> dict[str, Any]:
    """Return the record of a finished or unfinished preparation, or nothing."""
    for name in (MANIFEST, _BUILDING):
        try:
            return read_manifest(home / name)
        except (OSError, ValueError):
            continue
    return {}
