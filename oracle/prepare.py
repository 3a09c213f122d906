"""`python -m oracle.prepare`: from a corpus to everything that training and scoring read.

1. Fetch the corpus, unless it is a folder of the user's own.
2. Train the tokenizer on training text.
3. Encode and pack val and heldout, once.
4. Encode the training documents, one shard a part.
5. Write the manifest, whose presence says that everything is there.

Until then a record of its own says what is finished, so that an interrupted preparation goes on where it was.
"""

import argparse
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np

from oracle._building import Building, recorded
from oracle.constants import CLIMBMIX, PROFILES, TINY, Profile
from oracle.corpus import (
    CLIMBMIX_HELD_OUT,
    CLIMBMIX_SHARDS,
    CLIMBMIX_URL,
    HELD_OUT,
    WHEEL,
    WHEEL_FILE,
    Corpus,
    DataError,
    FolderCorpus,
    HeldOut,
    ShardCorpus,
    WheelCorpus,
    check_wheel,
    fetch_wheel,
)
from oracle.download import download
from oracle.packing import Tokens, pack
from oracle.prepared import (
    Prepared,
    active_profile,
    data_folder,
    default_profile,
    named_profile,
    prepare_command,
    profile_name,
)
from oracle.tokenizer import TOKEN_BYTES_FILE, TOKENIZER_FILE, Tokenizer, training_texts

__all__ = ["Prepared", "active_profile", "data_folder", "default_profile", "main", "prepare", "profile_name"]

DEFAULT_SHARDS = 10
_BATCH = 1_024  # documents encoded at a time

Say = Callable[[str], None]


def prepare(profile: Profile, corpus: Corpus, say: Say) -> Prepared:
    """Build what is missing of the data of `profile` from `corpus`; `say` hears one line of progress at a time.

    Finished files of an earlier, interrupted or damaged preparation of the same corpus are kept.
    """
    with Building.begin(profile, corpus) as building:
        if building.lacks(TOKENIZER_FILE) or building.lacks(TOKEN_BYTES_FILE):
            say(f"training the tokenizer: {profile.vocab_size:,} tokens")
            texts = training_texts(
                corpus.tokenizer_texts(),
                chars=profile.tokenizer_chars,
                document_chars=profile.tokenizer_document_chars,
            )
            tokenizer = Tokenizer.train(texts, profile.vocab_size)
            tokenizer.save(building.home)
            building.add_base(TOKENIZER_FILE, TOKEN_BYTES_FILE)
        tokenizer = Tokenizer.load(building.home)
        for split in HELD_OUT:
            if building.lacks(f"{split}.npy"):
                _held_out_rows(building, profile, corpus, tokenizer, split, say)
            corpus.packed(split, building.packed(split))
        for part in range(corpus.parts):
            if building.lacks(name := f"train-{part:05}.npy"):
                title = f"encoding training part {part + 1} of {corpus.parts}"
                documents = _encoded(profile, corpus, corpus.part(part), tokenizer, title, say)
                pieces = list(chain.from_iterable(documents))
                if not pieces:
                    raise DataError(f"training part {part} holds no document that is not held out")
                if corpus.splits_long:  # in the order of their digests, or a batch would be rows of one long document
                    pieces.sort(key=lambda piece: hashlib.sha256(piece.tobytes()).digest())
                building.save(name, np.concatenate(pieces), tokenizer.bos_id)
        return building.finish()


def _held_out_rows(
    building: Building,
    profile: Profile,
    corpus: Corpus,
    tokenizer: Tokenizer,
    split: HeldOut,
    say: Say,
) -> None:
    read = 0

    def pieces() -> Iterator[Tokens]:
        nonlocal read
        for document in _encoded(profile, corpus, corpus.held_out(split), tokenizer, f"packing {split}", say):
            read += 1
            yield from document

    rows = list(islice(pack(pieces(), profile.seq_len + 1), profile.eval_rows))
    if len(rows) < profile.eval_rows:
        raise DataError(
            f"{split} fills only {len(rows)} of the {profile.eval_rows} rows that profile {profile.name} scores: "
            "the corpus needs more text"
        )
    building.save(f"{split}.npy", np.stack(rows), tokenizer.bos_id, packed=read)


def _encoded(
    profile: Profile, corpus: Corpus, texts: Iterable[str], tokenizer: Tokenizer, title: str, say: Say
) -> Iterator[list[Tokens]]:
    """Yield each text in pieces that begin with BOS: one piece unless the corpus splits long documents."""
    source = iter(texts)
    count = 0
    bos = np.array([tokenizer.bos_id], dtype=np.uint16)
    while batch := list(islice(source, _BATCH)):
        count += len(batch)
        say(f"{title}: {count:,} documents")
        for document in tokenizer.encode_documents(batch, os.cpu_count() or 1):
            if not corpus.splits_long:
                yield [document]
                continue
            starts = range(profile.seq_len + 1, len(document), profile.seq_len)
            rest = (np.concatenate([bos, document[start : start + profile.seq_len]]) for start in starts)
            yield [document[: profile.seq_len + 1], *rest]


class _Progress:
    """One live line on a terminal; elsewhere a plain line when something new begins."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._begun = ""

    def say(self, line: str) -> None:
        """Show what is being done: a title, and after a colon how far it is."""
        title = line.partition(":")[0]
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{line[:width]}", end="", file=sys.stderr, flush=True)
        elif title != self._begun:
            print(line, file=sys.stderr, flush=True)
        self._begun = title

    def close(self) -> None:
        """Leave the live line."""
        if self._live and self._begun:
            print(file=sys.stderr)


def _source(arguments: argparse.Namespace, profile: Profile, say: Say) -> Corpus:
    if arguments.corpus is not None:
        say(f"reading {arguments.corpus}")
        return FolderCorpus(arguments.corpus, held_out_tokens=profile.eval_rows * (profile.seq_len + 1))
    raw = data_folder(profile) / "raw"
    if profile is TINY:
        say(f"fetching {WHEEL}")
        wheel = check_wheel(arguments.wheel) if arguments.wheel else fetch_wheel(raw)
        say(f"reading {wheel}")
        return WheelCorpus(wheel)
    before = recorded(data_folder(profile)).get("corpus", {})
    shards = arguments.shards or before.get("training_shards", DEFAULT_SHARDS)
    training = [f"shard_{shard:05}.parquet" for shard in range(shards)]
    held_out = {split: f"shard_{shard:05}.parquet" for split, shard in CLIMBMIX_HELD_OUT.items()}
    names = [*held_out.values(), *training]
    missing = sum(not (raw / name).is_file() for name in names)
    finished = 0

    def received(name: str, size: int) -> None:
        nonlocal finished
        finished += 1
        say(f"fetched {name}, {size / 1e6:.0f} MB, file {finished} of {missing}")

    say(f"fetching {missing} files from {arguments.base_url}")
    download(arguments.base_url, names, raw, workers=arguments.workers, received=received)
    return ShardCorpus([raw / name for name in training], {split: raw / name for split, name in held_out.items()})


def _run(arguments: argparse.Namespace, say: Say) -> str:
    profile = named_profile(arguments.profile, "--profile") if arguments.profile else active_profile()
    chosen = arguments.corpus or arguments.wheel or arguments.shards
    if arguments.wheel and (arguments.corpus or profile is not TINY):
        raise DataError("--wheel is the corpus of profile tiny: it goes with neither another profile nor --corpus")
    if arguments.shards and (arguments.corpus or profile is not CLIMBMIX):
        raise DataError(
            "--shards counts the shards of profile climbmix: it goes with neither another profile nor --corpus"
        )
    home = data_folder(profile)
    if not chosen:
        try:
            return _summary(Prepared.open(profile), "is prepared")
        except DataError:
            if recorded(home).get("corpus", {}).get("kind") == "folder":
                raise DataError(
                    f"{home} is unfinished or damaged and came from a folder of yours: run "
                    f"`{prepare_command(profile)} --corpus FOLDER` again, or delete it"
                ) from None
    started = time.monotonic()
    prepared = prepare(profile, _source(arguments, profile, say), say)
    return _summary(prepared, f"is prepared in {time.monotonic() - started:.0f} s")


def _summary(prepared: Prepared, verb: str) -> str:
    counts = prepared.manifest["counts"]
    training = [entry for name, entry in counts.items() if name.startswith("train-")]
    documents, tokens = (sum(entry[key] for entry in training) for key in ("documents", "tokens"))
    held_out = ", ".join(f"{split} {counts[f'{split}.npy']['tokens']:,}" for split in HELD_OUT)
    return (
        f"{prepared.profile.name} {verb}: {documents:,} training documents, {tokens:,} tokens, {held_out}; "
        f"it lies in {prepared.home}"
    )


def main() -> int:
    """Prepare one profile; return 0, 1 with one line for what the user can mend, or 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m oracle.prepare", description="Prepare the data of a profile.")
    parser.add_argument("--profile", metavar="NAME", help=f"{' or '.join(PROFILES)}; default: the one in use")
    parser.add_argument("--corpus", metavar="FOLDER", type=Path, help="your own text or parquet files")
    parser.add_argument("--wheel", metavar="PATH", type=Path, help=f"{WHEEL_FILE}, where there is no registry")
    parser.add_argument("--shards", metavar="N", type=_count(CLIMBMIX_SHARDS), help=f"climbmix: {DEFAULT_SHARDS}")
    parser.add_argument("--workers", metavar="N", type=_count(64), default=8, help="downloads at a time: 8")
    parser.add_argument("--base-url", metavar="URL", default=CLIMBMIX_URL, help="where climbmix is fetched from")
    arguments = parser.parse_args()
    progress = _Progress()
    try:
        line, code = _run(arguments, progress.say), 0
    except (DataError, OSError) as error:
        line, code = f"error: {error}", 1
    except KeyboardInterrupt:
        line, code = "interrupted: run the same command to go on", 130
    progress.close()
    print(line, file=sys.stderr if code else sys.stdout)
    return code


def _count(most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not 1 <= (value := int(text)) <= most:
            raise argparse.ArgumentTypeError(f"{value} is not between 1 and {most}")
        return value

    return number


if __name__ == "__main__":
    sys.exit(main())
