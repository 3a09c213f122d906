"""Preparation: the files it makes, that they are checked, that it goes on after anything, and what its command says.

Needs rustbpe, tiktoken and pyarrow. The command runs as a real process with a cache folder of its own; a profile of a
few rows keeps everything else small.
"""

import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

import oracle
from oracle.constants import PROFILES, TINY
from oracle.corpus import HELD_OUT, DataError, FolderCorpus, ShardCorpus, text_digest
from oracle.packing import Tokens
from oracle.prepare import Prepared, active_profile, data_folder, default_profile, prepare
from oracle.tokenizer import Tokenizer

from .test_corpus import Hub, hub, write_parquet

__all__ = ["hub"]

MINI = replace(TINY, name="mini", seq_len=32, vocab_size=400, eval_rows=8)
HELD_OUT_TOKENS = MINI.eval_rows * (MINI.seq_len + 1)
PART_BYTES = 10_000  # cuts what `folder` leaves for training into four parts
ROOT = Path(oracle.__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a cache folder, and no profile from outside."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("AUTORESEARCH_PROFILE", raising=False)
    return tmp_path / "cache"


def make_texts(count: int, words: int, seed: int = 3) -> list[str]:
    """Return documents of made-up words, the same in every run; one in ten is far longer than a row."""
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices("abcdefghijklmnoprstuvwy", k=draw.randint(1, 9))) for _ in range(2_000)]
    return [" ".join(draw.choices(vocabulary, k=words * (1 + 9 * (i % 10 == 0)))) + "." for i in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a corpus that suits profile mini."""
    path = tmp_path / "corpus"
    path.mkdir()
    for index, text in enumerate(make_texts(300, 12)):
        (path / f"{index}.txt").write_text(text)
    return path


class Parts(FolderCorpus):
    """A folder in four parts, as if it were large."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, held_out_tokens=HELD_OUT_TOKENS, part_bytes=PART_BYTES)


def quiet(line: str) -> None:
    """Say nothing."""


# ---------------------------------------------------------------------------------------------------------------------
# What is made


def pieces(texts: Iterable[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The documents cut to rows of MINI, each piece with BOS in front, in the order of their tokens' digests."""
    cut = []
    for text in texts:
        tokens = tokenizer.encode(text)
        for start in range(0, len(tokens), MINI.seq_len):
            cut.append([tokenizer.bos_id, *tokens[start : start + MINI.seq_len]])
    return sorted(cut, key=lambda piece: sha256(np.array(piece, np.uint16).tobytes()).digest())


def pieces_of(tokens: Tokens, tokenizer: Tokenizer) -> list[list[int]]:
    starts = np.flatnonzero(tokens == tokenizer.bos_id)
    return [piece.tolist() for piece in np.split(tokens, starts) if len(piece)]


def test_what_is_prepared(folder: Path, cache: Path) -> None:
    """Rows, shards, tokenizer and counts fit together; no document is in two splits and none loses its tail."""
    prepared = prepare(MINI, Parts(folder), quiet)
    tokenizer = prepared.tokenizer()
    assert prepared.home == cache / "mini" and tokenizer.vocab_size == MINI.vocab_size
    assert prepared.bos_id == tokenizer.bos_id
    assert np.array_equal(prepared.token_bytes(), tokenizer.token_bytes)
    for split in HELD_OUT:
        rows = prepared.val_rows(split)
        assert rows.shape == (MINI.eval_rows, MINI.seq_len + 1) and rows.dtype == np.uint16
        assert (rows[:, 0] == tokenizer.bos_id).all()
    corpus = Parts(folder)
    for part, shard in enumerate(prepared.train_shards()):
        assert shard.dtype == np.uint16 and shard[0] == tokenizer.bos_id
        assert np.diff([*np.flatnonzero(shard == tokenizer.bos_id), len(shard)]).max() <= MINI.seq_len + 1
        assert pieces_of(shard, tokenizer) == pieces(corpus.part(part), tokenizer)
        assert prepared.manifest["counts"][f"train-{part:05}.npy"]["tokens"] == len(shard)
    assert Prepared.open(MINI).manifest == json.loads((prepared.home / "manifest.json").read_bytes())


@pytest.mark.parametrize("interrupted", [None, "packing heldout", "encoding training part 1 of 1"])
def test_held_back_documents_that_nothing_was_packed_from_are_trained_on(
    tmp_path: Path, cache: Path, interrupted: str | None
) -> None:
    """Training is all documents after those that packing read, its buffer included, whenever it was interrupted."""
    profile = replace(MINI, eval_rows=400)
    texts = sorted(make_texts(3_000, 12), key=text_digest)
    write_parquet(tmp_path / "corpus" / "a.parquet", texts)

    def corpus() -> FolderCorpus:
        return FolderCorpus(tmp_path / "corpus", held_out_tokens=profile.eval_rows * (profile.seq_len + 1))

    def say(line: str) -> None:
        if interrupted and line.startswith(interrupted):
            raise KeyboardInterrupt

    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            prepare(profile, corpus(), say)
    prepared = prepare(profile, corpus(), quiet)
    val, heldout = (prepared.manifest["counts"][f"{split}.npy"]["packed"] for split in HELD_OUT)
    held_back = prepared.manifest["corpus"]["held_back"]
    assert val + heldout < held_back - 100
    tokenizer = prepared.tokenizer()
    assert tokenizer.ranks == Tokenizer.train(texts[held_back:], profile.vocab_size).ranks
    [shard] = prepared.train_shards()
    assert pieces_of(shard, tokenizer) == pieces(texts[val + heldout :], tokenizer)
    for split, read in (("val", texts[:val]), ("heldout", texts[val : val + heldout])):
        rows = prepared.val_rows(split)  # type: ignore[arg-type]
        found = [piece for row in rows for piece in pieces_of(row, tokenizer)]
        assert all(any(tokenizer.decode(piece[1:]) in text for text in read) for piece in found[::50])


def test_shards_keep_their_documents_whole(tmp_path: Path) -> None:
    """Of downloaded shards every document is one, however long, in the shards' order."""
    texts = make_texts(300, 12)
    paths = [write_parquet(tmp_path / f"{i}.parquet", texts[i * 75 : i * 75 + 75]) for i in range(4)]
    prepared = prepare(MINI, ShardCorpus(paths[:2], {"val": paths[2], "heldout": paths[3]}), quiet)
    tokenizer = prepared.tokenizer()
    for index, shard in enumerate(prepared.train_shards()):
        documents = np.split(shard, np.flatnonzero(shard == tokenizer.bos_id)[1:])
        assert [tokenizer.decode(document[1:]) for document in documents] == texts[index * 75 : index * 75 + 75]


def test_preparing_elsewhere_gives_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same corpus, same constants: same bytes."""
    first = prepare(MINI, Parts(folder), quiet)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "other"))
    second = prepare(MINI, Parts(folder), quiet)
    assert first.home != second.home
    assert first.digest == second.digest


def test_another_corpus_replaces_everything(folder: Path) -> None:
    """Nothing of the former corpus stays in the data or on the disk, and the digest tells them apart."""
    before = prepare(MINI, Parts(folder), quiet)
    (folder / "more.txt").write_text("one more document than before")
    after = prepare(MINI, FolderCorpus(folder, held_out_tokens=HELD_OUT_TOKENS), quiet)
    assert len(after.train_shards()) == 1 and before.digest != after.digest
    assert {path.name for path in after.home.glob("train-*")} == {"train-00000.npy"}


# ---------------------------------------------------------------------------------------------------------------------
# Interruption and damage


STEPS = [
    "training the tokenizer",
    "packing val",
    "packing heldout",
    *(f"encoding training part {part} of 4" for part in range(1, 5)),
]


@pytest.mark.parametrize("interrupted", STEPS)
def test_an_interrupted_preparation_goes_on(folder: Path, interrupted: str) -> None:
    """What was finished before Ctrl-C is not made again, and the end is that of an uninterrupted run."""
    said: list[str] = []

    def say(line: str) -> None:
        title = line.partition(":")[0]
        if title == interrupted and interrupted not in said:
            said.append(title)
            raise KeyboardInterrupt
        if title not in said[said.index(interrupted) + 1 if interrupted in said else 0 :]:
            said.append(title)

    with pytest.raises(KeyboardInterrupt):
        prepare(MINI, Parts(folder), say)
    with pytest.raises(DataError, match=r"no data is prepared for profile mini .* run `python -m oracle\.prepare"):
        Prepared.open(MINI)
    resumed = prepare(MINI, Parts(folder), say)
    at = STEPS.index(interrupted)
    assert said == [*STEPS[: at + 1], *STEPS[at:]]
    for path in resumed.home.iterdir():
        path.unlink()
    assert prepare(MINI, Parts(folder), quiet).digest == resumed.digest


@pytest.mark.parametrize("name", ["tokenizer.json", "token_bytes.npy", "val.npy", "heldout.npy", "train-00002.npy"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damage_is_named_and_mended(folder: Path, name: str, damage: str) -> None:
    """A file that is missing, cut or has one flipped bit is named with the command, which makes it anew."""
    before = prepare(MINI, Parts(folder), quiet)
    path = before.home / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    match damage:
        case "missing":
            path.unlink()
        case "truncated":
            os.truncate(path, len(content) // 2)
        case "flipped":
            path.write_bytes(content)
    command = re.escape("run `python -m oracle.prepare --profile mini`")
    with pytest.raises(DataError, match=f"^{re.escape(str(path))} is (missing|damaged).*: {command}$"):
        Prepared.open(MINI)
    assert prepare(MINI, Parts(folder), quiet).digest == before.digest
    assert Prepared.open(MINI).digest == before.digest


@pytest.mark.parametrize("name", ["token_bytes.npy", "val.npy", "train-00002.npy"])
def test_a_file_that_was_seen_before_is_read_again_once_anything_touched_it(folder: Path, name: str) -> None:
    prepare(MINI, Parts(folder), quiet)
    known = json.loads(json.dumps(Prepared.open(MINI).identity))
    assert Prepared.open(MINI, known).identity == known
    path = Prepared.open(MINI).home / name
    content, before = path.read_bytes(), path.stat()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=f"{name} is damaged"):
        Prepared.open(MINI, known)
    path.write_bytes(content)
    assert Prepared.open(MINI, known).identity[name]["sha256"] == known[name]["sha256"]


def test_data_that_was_prepared_anew_is_not_the_data_that_was_known(folder: Path) -> None:
    prepare(MINI, Parts(folder), quiet)
    known = Prepared.open(MINI).identity
    (folder / "more.txt").write_text("another document of one's own")
    prepare(MINI, Parts(folder), quiet)
    with pytest.raises(DataError, match="was prepared anew since the first run: start again"):
        Prepared.open(MINI, known)


def test_a_changed_manifest_is_refused(folder: Path) -> None:
    """Every byte of the manifest counts: no flipped bit goes unnoticed."""
    path = prepare(MINI, Parts(folder), quiet).home / "manifest.json"
    content = path.read_bytes()
    draw = random.Random(0)
    for _ in range(200):
        flipped = bytearray(content)
        flipped[at := draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        if flipped[at : at + 1].isspace() and content[at : at + 1].isspace():
            continue  # another blank between two items says the same
        path.write_bytes(flipped)
        with pytest.raises(DataError, match=r"manifest\.json is damaged: run `python -m"):
            Prepared.open(MINI)


def test_other_constants_need_other_data(folder: Path) -> None:
    """Data that was made for another row length is not taken for this one."""
    prepare(MINI, Parts(folder), quiet)
    with pytest.raises(DataError, match="was prepared with other constants"):
        Prepared.open(replace(MINI, seq_len=16))


def test_only_one_prepares_at_a_time(folder: Path, cache: Path) -> None:
    """A second preparation of the same profile ends at once with one line."""
    (cache / "mini").mkdir(parents=True)
    with (cache / "mini" / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="is being prepared by another process"):
            prepare(MINI, Parts(folder), quiet)


def test_too_little_text(folder: Path) -> None:
    """Too few tokens for the vocabulary, or too few rows to score, is one line with both numbers."""
    with pytest.raises(DataError, match=r"too little text for a vocabulary of 20000: only \d+ of 19996"):
        prepare(replace(MINI, vocab_size=20_000), Parts(folder), quiet)
    with pytest.raises(DataError, match=r"val fills only \d+ of the 5000 rows that profile mini scores"):
        prepare(replace(MINI, eval_rows=5_000), Parts(folder), quiet)


# ---------------------------------------------------------------------------------------------------------------------
# Profiles


def test_the_profile_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny unless climbmix is prepared or the environment names another; a wrong name is told with its source."""
    assert default_profile() is active_profile() is TINY
    monkeypatch.setenv("AUTORESEARCH_PROFILE", "climbmix")
    assert active_profile() is PROFILES["climbmix"]
    monkeypatch.setenv("AUTORESEARCH_PROFILE", "huge")
    with pytest.raises(DataError, match="unknown profile 'huge' from AUTORESEARCH_PROFILE: choose tiny or climbmix"):
        active_profile()


def test_importing_loads_nothing_heavy() -> None:
    """Neither torch nor the libraries that only preparation needs are imported with the modules."""
    heavy = ["torch", "pyarrow", "tiktoken", "rustbpe", "pytest", "pytest_autoresearch"]
    code = f"import sys, oracle.prepare, oracle.dataloader; sys.exit(str(set({heavy}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "set()"


# ---------------------------------------------------------------------------------------------------------------------
# The command


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m oracle.prepare` as a user does."""
    words = [sys.executable, "-m", "oracle.prepare", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_a_folder_of_ones_own(tmp_path: Path, cache: Path) -> None:
    """The command prepares profile tiny from a folder, says where it lies, and has nothing to do the second time."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for start in range(0, 10):
        (folder / f"{start}.txt").write_text("\n".join(make_texts(500, 45, seed=start)))
    for index, text in enumerate(make_texts(400, 200, seed=11)):
        (folder / f"s{index}.md").write_text(text)
    first = command("--profile", "tiny", "--corpus", folder)
    assert first.returncode == 0, first.stderr
    assert re.fullmatch(r"tiny is prepared in \d+ s: .* training documents, .* tokens, val 131,584, .*\n", first.stdout)
    assert str(cache / "tiny") in first.stdout
    progress = first.stderr.splitlines()
    assert progress[0] == f"reading {folder}" and progress[-1].startswith("encoding training part 1 of 1: ")
    second = command()
    assert (second.returncode, second.stderr) == (0, "")
    assert second.stdout.startswith("tiny is prepared: ") and str(cache / "tiny") in second.stdout

    (cache / "tiny" / "val.npy").unlink()
    damaged = command()
    assert damaged.returncode == 1 and "--corpus FOLDER` again, or delete it" in damaged.stderr
    assert command("--corpus", folder).returncode == 0
    assert Prepared.open(TINY).val_rows().shape == (512, 257)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "huge"], "unknown profile 'huge' from --profile: choose tiny or climbmix"),
        (["--wheel", "nowhere.whl"], "nowhere.whl does not exist"),
        (["--wheel", __file__], "is not the pinned botocore-1.43.11-py3-none-any.whl"),
        (["--wheel", "a.whl", "--profile", "climbmix"], "--wheel is the corpus of profile tiny"),
        (["--shards", "3", "--profile", "tiny"], "--shards counts the shards of profile climbmix"),
        (["--corpus", "nowhere"], "nowhere is not a folder: give --corpus a folder"),
        (["--corpus", "empty"], "empty holds no documents"),
        (["--corpus", "pictures"], "picture.png is not text"),
        (["--corpus", "little"], "too little for this profile: it needs at least 0.8 MB"),
    ],
)
def test_what_a_user_can_get_wrong(tmp_path: Path, arguments: list[str], message: str) -> None:
    """Each mistake is one line on stderr after the progress, without a traceback, and exit code 1."""
    for name in ("empty", "pictures", "little"):
        (tmp_path / name).mkdir()
    (tmp_path / "pictures" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "little" / "a.txt").write_text("little")
    done = command(*(str(tmp_path / word) if (tmp_path / word).exists() else word for word in arguments))
    assert done.returncode == 1 and done.stdout == ""
    *progress, error = done.stderr.splitlines()
    assert error.startswith("error: ") and message in error
    assert all(line.startswith(("reading ", "fetching ")) for line in progress)


@pytest.mark.parametrize("shards", ["0", "6542", "many"])
def test_an_impossible_number_of_shards(shards: str) -> None:
    """Shards that are held out, and numbers that are none, are refused with the usage."""
    done = command("--profile", "climbmix", "--shards", shards)
    assert done.returncode == 2 and "argument --shards" in done.stderr


def test_a_missing_shard_is_named(hub: Hub) -> None:
    """A server without the shards is one line with the address."""
    hub.faults = {f"shard_{shard:05}.parquet": ["404"] for shard in (0, 6541, 6542)}
    done = command("--profile", "climbmix", "--shards", "1", "--base-url", hub.url)
    assert done.returncode == 1
    assert re.search(
        rf"^error: {hub.url}shard_\d+\.parquet cannot be fetched: the server answers 404", done.stderr, re.M
    )


def test_ctrl_c_is_one_line(hub: Hub, cache: Path) -> None:
    """Ctrl-C while a server stalls ends the command with exit code 130; nothing half-made has its final name."""
    hub.faults = {f"shard_{shard:05}.parquet": ["stalls"] for shard in (0, 6541, 6542)}
    words = [sys.executable, "-m", "oracle.prepare", "--profile", "climbmix", "--shards", "1", "--base-url", hub.url]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert hub.asked.wait(60)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[1:] == ["interrupted: run the same command to go on"]
    assert not list((data_folder(PROFILES["climbmix"]) / "raw").glob("*.parquet"))
