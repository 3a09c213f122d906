"""train.py as it was before anything was tuned or fused: the starting point that benchmarks compare with.

Its figures are those of the public system; `python -m benchmarks.gpu` trains it beside the train.py of today.
"""

import gc
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracle
from oracle import optim

PROFILE = oracle.profile_name()

# -----------------------------------------------------------------------------
# Model

DEPTH = {"tiny": 2, "climbmix": 8}[PROFILE]  # transformer blocks
ASPECT_RATIO = 64  # width = DEPTH * ASPECT_RATIO, rounded up to whole heads
HEAD_DIM = {"tiny": 64, "climbmix": 128}[PROFILE]  # channels of a head
MLP_RATIO = 4.0  # hidden channels of the MLP, in widths
WINDOW_PATTERN = "SSSL"  # attention of the blocks in turn: L sees all of the context, S a part; the last is always L
SHORT_WINDOW = 0.5  # the part of the context that S sees
ROPE_BASE = 10_000.0  # longest wavelength of the rotary positions
QK_SCALE = 1.0  # factor on normed queries and keys; more is sharper attention
SOFTCAP = 15.0  # logits are squashed into (-SOFTCAP, SOFTCAP)
GATE_CHANNELS = 32  # channels that a value embedding's gate looks at
GATE_RANGE = 2.0  # gates lie in (0, GATE_RANGE); half of it at the start

# Initialisation
EMBEDDING_STD = 1.0  # token embedding, normal
UNEMBEDDING_STD = 0.001  # output head, normal
MATRIX_STD = 1.0  # q, k, v and value embeddings, uniform, in units of width**-0.5
MLP_STD = 1.0  # MLP input, uniform, in the same units
RESID_LAMBDA = 1.0  # each block's weight of the residual stream
X0_LAMBDA = 0.1  # each block's weight of the embedding


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + D/2) of x [B, H, T, D] by their position's angles [T, D/2]."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos + right * sin, right * cos - left * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, width: int, head_dim: int, short: bool, gated: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.short = short
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate = nn.Linear(min(GATE_CHANNELS, width), width // head_dim, bias=False) if gated else None

    def heads(self, x: Tensor) -> Tensor:  # [B, T, H * D] -> [B, H, T, D]
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor, value: Tensor | None, cos: Tensor, sin: Tensor, window: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        if self.gate is not None and value is not None:
            gate = GATE_RANGE * torch.sigmoid(self.gate(x[..., : self.gate.in_features]))
            v = v + gate.transpose(1, 2).unsqueeze(-1) * self.heads(value)
        q, k = norm(rotate(q, cos, sin)) * QK_SCALE, norm(rotate(k, cos, sin)) * QK_SCALE
        if self.short:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=window)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = math.ceil(MLP_RATIO * width)
        self.fc = nn.Linear(width, hidden, bias=False)
        self.proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(F.relu(self.fc(x)).square())
        return out


class GPT(nn.Module):
    """Map tokens int64 [B, T] to logits float32 [B, T, V]; T at most `seq_len`."""

    cos: Tensor  # [T, D/2]
    sin: Tensor
    window: Tensor  # bool [T, T]: what S blocks may look at

    def __init__(self, vocab_size: int, seq_len: int) -> None:
        super().__init__()
        head_dim = HEAD_DIM + HEAD_DIM % 2
        width = math.ceil(DEPTH * ASPECT_RATIO / head_dim) * head_dim
        pattern = (WINDOW_PATTERN * DEPTH)[: DEPTH - 1] + "L"
        if set(pattern) - {"S", "L"}:
            raise ValueError(f"WINDOW_PATTERN is {WINDOW_PATTERN!r}, use the letters S and L")
        gated = [layer % 2 == (DEPTH - 1) % 2 for layer in range(DEPTH)]  # every other block, the last among them
        self.seq_len = seq_len
        self.embedding = nn.Embedding(vocab_size, width)
        self.values = nn.ModuleDict({str(i): nn.Embedding(vocab_size, width) for i in range(DEPTH) if gated[i]})
        self.attention = nn.ModuleList(Attention(width, head_dim, pattern[i] == "S", gated[i]) for i in range(DEPTH))
        self.mlp = nn.ModuleList(MLP(width) for _ in range(DEPTH))
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.resid_lambdas = nn.Parameter(torch.full((DEPTH,), RESID_LAMBDA))
        self.x0_lambdas = nn.Parameter(torch.full((DEPTH,), X0_LAMBDA))

        # Tables that follow from the shapes alone
        position = torch.arange(seq_len, dtype=torch.float64)
        angle = torch.outer(position, ROPE_BASE ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim))
        distance = position[:, None] - position[None, :]
        window = (distance >= 0) & (distance < math.ceil(SHORT_WINDOW * seq_len))
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        self.register_buffer("window", window, persistent=False)
        self.init_weights(width)

    @torch.no_grad()
    def init_weights(self, width: int) -> None:
        bound = math.sqrt(3 / width)  # uniform in (-bound, bound) has std width**-0.5
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        nn.init.normal_(self.head.weight, std=UNEMBEDDING_STD)
        for weight in self.values.parameters():
            nn.init.uniform_(weight, -bound * MATRIX_STD, bound * MATRIX_STD)
        for name, weight in (*self.attention.named_parameters(), *self.mlp.named_parameters()):
            if "proj" in name or "gate" in name:
                nn.init.zeros_(weight)
            else:
                scale = MLP_STD if "fc" in name else MATRIX_STD
                nn.init.uniform_(weight, -bound * scale, bound * scale)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.size(1)
        if length > self.seq_len:
            raise ValueError(f"a row of {length} tokens, but the model was built for at most {self.seq_len}")
        # bfloat16 where it is fast, whatever the caller's own setting
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
            cos, sin, window = self.cos[:length], self.sin[:length], self.window[:length, :length]
            x = x0 = norm(self.embedding(tokens))
            for i, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
                value = self.values[str(i)](tokens) if str(i) in self.values else None
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
                x = x + attention(norm(x), value, cos, sin, window)
                x = x + mlp(norm(x))
            logits = self.head(norm(x)).float()
        return SOFTCAP * torch.tanh(logits / SOFTCAP)


def build_model(spec: oracle.ModelSpec) -> nn.Module:
    model = GPT(spec.vocab_size, spec.seq_len).to(spec.device)
    if spec.device.type == "cuda":  # embeddings are most of the parameters
        for embedding in (model.embedding, *model.values.values()):
            embedding.bfloat16()
    return model


# -----------------------------------------------------------------------------
# Optimizer

TOTAL_BATCH_SIZE = {"tiny": 8_192, "climbmix": 524_288}[PROFILE]  # tokens a step
DEVICE_BATCH_SIZE = {"tiny": 16, "climbmix": 128}[PROFILE]  # rows a micro-batch

EMBEDDING_LR = 0.6  # token and value embeddings, x (width / 768)**-0.5
UNEMBEDDING_LR = 0.004  # output head, scaled likewise
MATRIX_LR = 0.04  # block matrices (Muon)
RESID_LR = 0.005  # resid_lambdas
SCALAR_LR = 0.5  # x0_lambdas
ADAM_BETA1 = 0.8  # embeddings, head, resid_lambdas
ADAM_BETA2 = 0.95  # all that AdamW trains
SCALAR_BETA1 = 0.96  # x0_lambdas
ADAM_EPS = 1e-10
WEIGHT_DECAY = 0.2  # block matrices, falling to 0 over the run
MUON_MOMENTUM_START = 0.85  # at step 0
MUON_MOMENTUM = 0.95  # from step MUON_MOMENTUM_STEPS on
MUON_MOMENTUM_STEPS = 300
MUON_BETA2 = 0.95  # variance reduction
MUON_STEPS = 5  # Polar Express iterations
MUON_NORM_MARGIN = 0.02  # safety margin on the norm that they start from

WARMUP_RATIO = 0.0  # share of the budget in which learning rates rise from 0
WARMDOWN_RATIO = 0.5  # share of the budget in which they fall
FINAL_LR_FRAC = 0.0  # to this fraction


def build_optimizer(model: GPT) -> optim.MuonAdamW:
    scale = (model.head.in_features / 768) ** -0.5
    embeddings = [*model.embedding.parameters(), *model.values.parameters()]
    matrices = [*model.attention.parameters(), *model.mlp.parameters()]
    adamw = {"kind": "adamw", "betas": (ADAM_BETA1, ADAM_BETA2), "eps": ADAM_EPS}
    return optim.MuonAdamW(
        [
            {**adamw, "params": [model.head.weight], "lr": UNEMBEDDING_LR * scale},
            {**adamw, "params": embeddings, "lr": EMBEDDING_LR * scale},
            {**adamw, "params": [model.resid_lambdas], "lr": RESID_LR},
            {**adamw, "params": [model.x0_lambdas], "lr": SCALAR_LR, "betas": (SCALAR_BETA1, ADAM_BETA2)},
            {
                "kind": "muon",
                "params": matrices,
                "lr": MATRIX_LR,
                "beta2": MUON_BETA2,
                "steps": MUON_STEPS,
                "norm_factor": 1 + MUON_NORM_MARGIN,
            },
        ]
    )


# -----------------------------------------------------------------------------
# Training


def next_token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def train(run: oracle.Run) -> nn.Module:
    torch.manual_seed(run.seed)
    model = build_model(run.spec)
    assert isinstance(model, GPT)
    optimizer = build_optimizer(model)
    accumulation = max(1, round(TOTAL_BATCH_SIZE / (DEVICE_BATCH_SIZE * run.spec.seq_len)))  # micro-batches a step
    on_cuda = run.device.type == "cuda"
    if on_cuda:
        torch.set_float32_matmul_precision("high")
    loss_of = torch.compile(next_token_loss, dynamic=False) if on_cuda else next_token_loss

    # Warm up (and compile) before the clock starts, leaving no trace in weights or random state
    with torch.random.fork_rng([run.device] if on_cuda else []):
        loss_of(model, *run.dummy_batch(DEVICE_BATCH_SIZE)).backward()  # type: ignore[no-untyped-call]
    optimizer.zero_grad()
    # The garbage collector's pauses cost steps: collect now, and rarely from here on
    gc.collect()
    gc.freeze()
    gc.disable()

    step, micro_steps = 0, 0
    loss_sum = torch.zeros((), device=run.device)
    smooth_loss = 0.0
    for inputs, targets, _ in run.batches(DEVICE_BATCH_SIZE):
        loss = loss_of(model, inputs, targets) / accumulation
        loss.backward()  # type: ignore[no-untyped-call]
        loss_sum += loss.detach()
        micro_steps += 1
        if micro_steps % accumulation:
            continue

        progress = run.progress
        multiplier = optim.lr_multiplier(progress, WARMUP_RATIO, WARMDOWN_RATIO, FINAL_LR_FRAC)
        optimizer.scale_lr(multiplier)
        for group in optimizer.param_groups:
            if group["kind"] == "muon":
                group["momentum"] = optim.muon_momentum(step, MUON_MOMENTUM_START, MUON_MOMENTUM, MUON_MOMENTUM_STEPS)
                group["weight_decay"] = optim.weight_decay(progress, WEIGHT_DECAY)
        optimizer.step()
        optimizer.zero_grad()

        step += 1
        step_loss = loss_sum.item()
        smooth_loss = 0.9 * smooth_loss + 0.1 * step_loss
        run.log(step, step_loss, lr=MATRIX_LR * multiplier, smooth=smooth_loss / (1 - 0.9**step))
        loss_sum.zero_()
        if step % 5_000 == 0:
            gc.collect()
    gc.enable()
    return model


if __name__ == "__main__":
    oracle.main(build_model, train)
