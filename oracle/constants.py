"""The locked constants: one `Profile` per kind of machine, and what every tokenizer shares."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One set of locked constants. Scores are comparable within one profile only."""

    name: str
    seq_len: int  # T: tokens of context in a row; a packed row holds T + 1
    vocab_size: int  # V: mergeable ranks plus specials
    budget_s: float  # wall-clock seconds of training
    startup_s: float  # from the trainer's start to its first batch, compilation included
    eval_rows: int  # packed rows that decide the score; the judge scores exactly these
    eval_batch: int  # rows in one forward pass of the scorer; kernels are not batch-invariant, so it is pinned
    tokenizer_chars: int  # characters of training text that the tokenizer is trained on
    tokenizer_document_chars: int  # at most this much of one document

    @property
    def eval_tokens(self) -> int:
        """Tokens predicted when the model is scored."""
        return self.eval_rows * self.seq_len


TINY = Profile(
    name="tiny",
    seq_len=256,
    vocab_size=1_024,
    budget_s=20.0,
    startup_s=60.0,
    eval_rows=512,  # 131,072 tokens
    eval_batch=16,
    tokenizer_chars=10_000_000,
    tokenizer_document_chars=10_000,
)
CLIMBMIX = Profile(
    name="climbmix",
    seq_len=2_048,
    vocab_size=8_192,
    budget_s=300.0,
    startup_s=180.0,
    eval_rows=10_240,  # 20,971,520 tokens
    eval_batch=16,  # 1 GiB of logits: two such fit on a card of 8 GB beside the model
    tokenizer_chars=1_000_000_000,
    tokenizer_document_chars=10_000,
)
PROFILES = {profile.name: profile for profile in (TINY, CLIMBMIX)}

BUFFER_DOCUMENTS = 1_000  # documents that best-fit packing chooses from
SPECIAL_TOKENS = tuple(f"<|reserved_{i}|>" for i in range(4))
BOS = SPECIAL_TOKENS[0]
# GPT-4's pattern, with digits in runs of one or two
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
MAX_LOSS = 100.0  # a run whose training loss passes this has diverged
