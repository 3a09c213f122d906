"""Byte-pair tokenizer: trained by rustbpe, run by tiktoken, stored as JSON and one array.

Every byte has a token and the split pattern covers every character, so any text survives a round trip; what a token is
worth in bytes is read from its raw bytes, never from decoded text.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from oracle.constants import BOS, SPECIAL_TOKENS, SPLIT_PATTERN
from oracle.corpus import DataError

if TYPE_CHECKING:
    import tiktoken

TOKENIZER_FILE = "tokenizer.json"
TOKEN_BYTES_FILE = "token_bytes.npy"
# The pattern's look-ahead after blanks recurses once a blank; tiktoken's stack ends near a million of them
_LONG_BLANK = re.compile(r"(\s{4096})")


class Tokenizer:
    """Encode text to token ids and back, and say how many bytes each id stands for."""

    def __init__(self, ranks: Mapping[bytes, int]) -> None:
        """Build from mergeable ranks {token bytes: id}; the special tokens take the ids after them.

        Raises ValueError unless ids are 0..n-1 without gaps, every single byte has one, and all ids fit into uint16.
        """
        self.ranks = dict(ranks)
        if sorted(self.ranks.values()) != list(range(len(self.ranks))):
            raise ValueError("the ids of the tokens are not 0, 1, 2, ... without gaps")
        if missing := [byte for byte in range(256) if bytes([byte]) not in self.ranks]:
            raise ValueError(f"byte {missing[0]} has no token")
        self.vocab_size = len(self.ranks) + len(SPECIAL_TOKENS)
        if self.vocab_size > 1 << 16:
            raise ValueError(f"{self.vocab_size} tokens do not fit into the 16 bits that a stored token has")
        self.bos_id = len(self.ranks) + SPECIAL_TOKENS.index(BOS)
        self.token_bytes: npt.NDArray[np.int64] = np.zeros(self.vocab_size, dtype=np.int64)  # [V], specials 0
        for token, rank in self.ranks.items():
            self.token_bytes[rank] = len(token)
        self._encoding = _encoding(self.ranks)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn `vocab_size` tokens, specials included, from texts; raise DataError when they yield fewer."""
        import rustbpe  # type: ignore[import-untyped]

        learner = rustbpe.Tokenizer()
        wanted = vocab_size - len(SPECIAL_TOKENS)
        learner.train_from_iterator(iter(texts), wanted, pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in learner.get_mergeable_ranks()}
        if len(ranks) != wanted:
            raise DataError(
                f"the corpus has too little text for a vocabulary of {vocab_size}: "
                f"only {len(ranks)} of {wanted} tokens could be learned; add more varied text"
            )
        return cls(ranks)

    def encode(self, text: str) -> list[int]:
        """Encode text without BOS; what looks like a special token is ordinary text.

        Raises ValueError for a lone surrogate, which has no bytes.
        """
        text.encode()  # tiktoken would replace a lone surrogate without a word
        pieces = _LONG_BLANK.split(text)
        if len(pieces) == 1:
            return self._encoding.encode_ordinary(text)
        return [token for piece in pieces for token in self._encoding.encode_ordinary(piece)]

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[npt.NDArray[np.uint16]]:
        """Encode each text with BOS in front: one uint16 array a text, in their order."""

        def encode(some: Sequence[str]) -> list[npt.NDArray[np.uint16]]:
            return [np.array([self.bos_id, *self.encode(text)], dtype=np.uint16) for text in some]

        share = max(1, -(-len(texts) // threads))  # one task a thread: a future costs more than a short text
        with ThreadPoolExecutor(threads) as pool:
            shares = pool.map(encode, [texts[start : start + share] for start in range(0, len(texts), share)])
            return [document for encoded in shares for document in encoded]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Join the bytes of token ids; a special token gives its name."""
        return self._encoding.decode_bytes([int(token) for token in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Turn token ids into text; bytes that are no UTF-8 show as U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and token_bytes.npy into `folder`, each complete or not at all."""
        ranks = [base64.b64encode(token).decode() for token in sorted(self.ranks, key=self.ranks.__getitem__)]
        body = {"ranks": ranks, "pattern": SPLIT_PATTERN, "specials": SPECIAL_TOKENS}
        text = json.dumps({"tokenizer": body, "sha256": _digest(body)}, separators=(",", ":"))
        staged = folder / f"{TOKENIZER_FILE}.tmp"
        staged.write_text(text, encoding="ascii")
        os.replace(staged, folder / TOKENIZER_FILE)
        staged = folder / f"{TOKEN_BYTES_FILE}.tmp"
        with staged.open("wb") as file:
            np.save(file, self.token_bytes, allow_pickle=False)
        os.replace(staged, folder / TOKEN_BYTES_FILE)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read what `save` wrote; raise DataError for anything missing, malformed or changed."""
        path = folder / TOKENIZER_FILE
        try:
            stored = json.loads(path.read_text(encoding="ascii"))
            body = stored["tokenizer"]
            if stored["sha256"] != _digest(body):
                raise ValueError("its digest does not match")
            if body["pattern"] != SPLIT_PATTERN or body["specials"] != list(SPECIAL_TOKENS):
                raise ValueError("it was made for another split pattern or other special tokens")
            tokens = [base64.b64decode(token, validate=True) for token in body["ranks"]]
            tokenizer = cls({token: rank for rank, token in enumerate(tokens)})
            path = folder / TOKEN_BYTES_FILE
            table = np.load(path, allow_pickle=False)
            if table.dtype != np.int64 or not np.array_equal(table, tokenizer.token_bytes):
                raise ValueError("it does not hold the byte counts of these tokens")
        except Exception as error:  # parsers raise many kinds on broken bytes; all mean the same here
            raise DataError(f"{path} cannot be used ({error}): run `python -m oracle.prepare` again") from error
        return tokenizer


def training_texts(texts: Iterable[str], *, chars: int, document_chars: int) -> Iterator[str]:
    """Yield texts, at most `document_chars` characters of each, until `chars` characters are out."""
    left = chars
    for text in texts:
        piece = text[: min(document_chars, left)]
        left -= len(piece)
        yield piece
        if not left:
            return


def _encoding(ranks: dict[bytes, int]) -> "tiktoken.Encoding":
    import tiktoken

    specials = {name: len(ranks) + index for index, name in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding("autoresearch", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials)


def _digest(body: object) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
