"""Small models of many kinds for the audit: honest language models, and cheats with what the audit should call them.

All map tokens int64 [B, T] to logits float32 [B, T, VOCAB].
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 32
WIDTH = 16
HEADS = 2
BOS = 0


def position_code(length: int) -> Tensor:
    """Sines and cosines [T, WIDTH]."""
    angle = torch.arange(length)[:, None] * 50.0 ** -torch.linspace(0, 1, WIDTH // 2)
    return torch.cat((angle.sin(), angle.cos()), -1)


def rotate(x: Tensor) -> Tensor:
    """Rotary positions on x [B, H, T, D]."""
    left, right = x.chunk(2, -1)
    angle = torch.arange(x.size(-2))[:, None] * 10.0 ** -torch.linspace(0, 1, left.size(-1))
    return torch.cat((left * angle.cos() + right * angle.sin(), right * angle.cos() - left * angle.sin()), -1)


class Model(nn.Module):
    """Embedding, a mixer that each kind overrides, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def mix(self, x: Tensor) -> Tensor:  # [B, T, WIDTH] -> the same
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.mix(x)
        logits: Tensor = self.head(x + F.gelu(self.hidden(x)))
        return logits


class Transformer(Model):
    """One block of attention, positions by sines, rotation or ALiBi; causal, in a window, or not causal."""

    def __init__(
        self, position: str = "sine", window: int | None = None, causal: bool = True, fused: bool = False
    ) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.position, self.window, self.causal, self.fused = position, window, causal, fused

    def mix(self, x: Tensor) -> Tensor:
        length = x.size(1)
        if self.position == "sine":
            x = x + position_code(length)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.position == "rotary":
            q, k = rotate(q), rotate(k)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        hidden = distance < 0 if self.causal else torch.zeros_like(distance, dtype=torch.bool)
        if self.window is not None:
            hidden = hidden | (distance >= self.window)
        bias = torch.zeros(length, length).masked_fill(hidden, -math.inf)
        if self.position == "alibi":
            bias = bias - 0.2 * distance.abs()
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = (q @ k.mT / q.size(-1) ** 0.5 + bias).softmax(-1) @ v
        return y.transpose(1, 2).flatten(2)


class Recurrent(Model):
    def __init__(self, kind: type[nn.RNNBase] = nn.GRU, bidirectional: bool = False) -> None:
        super().__init__()
        size = WIDTH // 2 if bidirectional else WIDTH
        self.core: nn.Module = kind(WIDTH, size, batch_first=True, bidirectional=bidirectional)  # type: ignore

    def mix(self, x: Tensor) -> Tensor:
        y: Tensor = self.core(x)[0]
        return y


class Convolution(Model):
    """A convolution over the last `kernel` positions; `ahead` shifts it into the future."""

    def __init__(self, kernel: int = 5, ahead: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, kernel)
        self.kernel, self.ahead = kernel, ahead

    def mix(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.pad(x.mT, (self.kernel - 1 - self.ahead, self.ahead))).mT
        return y


class Fourier(Model):
    """A causal long convolution by fast Fourier transform: causal, but for rounding that reaches every position."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(64, WIDTH))

    def mix(self, x: Tensor) -> Tensor:
        length = x.size(1)
        spectrum = torch.fft.rfft(x, 2 * length, dim=1) * torch.fft.rfft(self.filter[:length], 2 * length, dim=0)
        y: Tensor = torch.fft.irfft(spectrum, 2 * length, dim=1)
        return y[:, :length]


class LinearAttention(Model):
    """Linear attention as a running sum."""

    def mix(self, x: Tensor) -> Tensor:
        states = (x.unsqueeze(-1) * x.unsqueeze(-2)).cumsum(1)
        return (states @ x.unsqueeze(-1)).squeeze(-1) / 10


class Experts(Model):
    """A layer of four experts, one to a token. With a capacity, an expert drops the tokens that come too late."""

    def __init__(self, capacity: float | None = None) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.capacity = capacity

    def mix(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chosen = F.one_hot(self.gate(flat).argmax(-1), 4)
        if self.capacity is not None:
            chosen = chosen * (chosen.cumsum(0) <= self.capacity * len(flat) / 4)
        outputs = torch.stack([expert(flat) for expert in self.experts], 1)
        return (outputs * chosen.unsqueeze(-1)).sum(1).view_as(x)


class Normed(Model):
    """A batch norm over all tokens of the batch, with running statistics (`honest`) or with the batch's own."""

    def __init__(self, honest: bool = True) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, affine=False)
        self.honest = honest

    def mix(self, x: Tensor) -> Tensor:
        self.norm.train(not self.honest)
        y: Tensor = self.norm(x.mT)
        return y.mT


class Dropped(Model):
    """Dropout, off when the model is evaluated (`honest`) or always on."""

    def __init__(self, honest: bool = True) -> None:
        super().__init__()
        self.honest = honest

    def mix(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.1, training=self.training if self.honest else True)


class Impossible(Model):
    """Gives BOS no chance at all: honest, with logits of -inf."""

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = super().forward(tokens)
        return logits.index_fill(-1, torch.tensor([BOS]), -math.inf)


class RoundsByPlace(Model):
    """Rounds otherwise from place to place in the batch, as kernels may."""

    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        return logits + 1e-6 * torch.arange(len(tokens))[:, None, None]


class SequenceMean(Model):
    """Subtracts the mean over the whole row."""

    def mix(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class Cached(Model):
    """Attends to what it kept of the batches before."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(WIDTH)

    def mix(self, x: Tensor) -> Tensor:
        y = x + self.kept
        self.kept = x.mean((0, 1))
        return y


class FastWeights(Model):
    """Learns from each batch that it scores, in a buffer."""

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(VOCAB, VOCAB))

    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens) + self.counts[tokens].log1p()
        self.counts.index_put_((tokens[:, :-1], tokens[:, 1:]), torch.ones(()), accumulate=True)
        return logits


class FirstBatch(Model):
    """Centres on the statistics of the first batch that it sees, for good."""

    mean: Tensor | None = None

    def mix(self, x: Tensor) -> Tensor:
        if self.mean is None:
            self.mean = x.mean((0, 1))
        return x - self.mean


class Restless(Model):
    """Answers the same question otherwise each time."""

    calls = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(tokens) + 0.01 * torch.arange(VOCAB) * self.calls


class Mates(Model):
    """Sees the other rows of its batch."""

    def mix(self, x: Tensor) -> Tensor:
        return x + x.mean(0, keepdim=True)


class Peeker(Model):
    """At a share of positions, chosen by the tokens before, gives the next token a better chance.

    `conserving` takes the chance from one other token, so that the log-sum-exp stays as it was but for rounding;
    `only` names the one position at which it peeks.
    """

    def __init__(self, share: float, conserving: bool = False, gain: float = 2.0, only: int | None = None) -> None:
        super().__init__()
        self.share, self.conserving, self.gain, self.only = share, conserving, gain, only

    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        following = F.pad(tokens[:, 1:], (0, 1)).unsqueeze(-1)
        prime = 100_003
        code = (tokens * 7_919 + tokens.cumsum(1) * 104_729 + 12_345) % prime
        code = (code * code % prime) ** 2 % prime * code % prime / prime  # the fifth power mixes, one to one
        here = (code < self.share).unsqueeze(-1)
        if self.only is not None:
            here = here & (torch.arange(tokens.size(1)) == self.only).unsqueeze(-1)
        if not self.conserving:
            return logits.scatter_add(-1, following, self.gain * here)
        chances = logits.softmax(-1)
        loser = chances.argmax(-1, keepdim=True)
        taken = 0.5 * chances.gather(-1, loser) * here * (loser != following)
        return chances.scatter_add(-1, loser, -taken).scatter_add(-1, following, taken).log()


HONEST: dict[str, Callable[[], nn.Module]] = {
    "bigram": Model,
    "transformer": Transformer,
    "transformer, fused": lambda: Transformer(fused=True),
    "transformer, rotary": lambda: Transformer("rotary"),
    "transformer, ALiBi": lambda: Transformer("alibi"),
    "transformer, window": lambda: Transformer("rotary", window=5),
    "RNN": lambda: Recurrent(nn.RNN),
    "GRU": lambda: Recurrent(nn.GRU),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "convolution": Convolution,
    "linear attention": LinearAttention,
    "experts": Experts,
    "batch norm, eval": Normed,
    "dropout, eval": Dropped,
    "logits of -inf": Impossible,
    "rounds by place": RoundsByPlace,
}
AHEAD, STATE, MATES = "looks ahead", "carries state between batches", "depends on its batch mates"
CHEATS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no mask": (lambda: Transformer(causal=False), AHEAD),
    "shifted by one": (lambda: Convolution(ahead=1), AHEAD),
    "bidirectional GRU": (lambda: Recurrent(bidirectional=True), AHEAD),
    "mean of the row": (SequenceMean, AHEAD),
    "reads every next token": (lambda: Peeker(1.0), AHEAD),
    "keeps the normaliser": (lambda: Peeker(1.0, conserving=True), AHEAD),
    "knows every next token": (lambda: Peeker(1.0, gain=200.0), AHEAD),
    "peeks at every fifth": (lambda: Peeker(0.2), AHEAD),
    "batch norm, train": (lambda: Normed(honest=False), MATES),
    "sees its mates": (Mates, MATES),
    "capacity": (lambda: Experts(0.5), MATES),
    "cache": (Cached, STATE),
    "fast weights": (FastWeights, STATE),
    "first batch": (FirstBatch, STATE),
    "dropout, on": (lambda: Dropped(honest=False), STATE),
    "other each time": (Restless, STATE),
}
