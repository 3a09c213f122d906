"""A small GPT, trained within a fixed budget. This is the file to change: anything in it may go.

Two functions are owed to the oracle: build_model(spec) and train(run). `python train.py` gives an unsealed look.
"""

import gc
import importlib.util
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import oracle
from oracle import fused, optim

PROFILE = oracle.profile_name()

# -----------------------------------------------------------------------------
# Model

DEPTH = {"tiny": 2, "climbmix": 8}[PROFILE]  # transformer blocks
ASPECT_RATIO = 64  # width = DEPTH * ASPECT_RATIO, rounded up to whole heads
HEAD_DIM = {"tiny": 64, "climbmix": 128}[PROFILE]  # channels of a head
KV_GROUP = {"tiny": 1, "climbmix": 2}[PROFILE]  # at least so many query heads share a key and a value head
MLP_RATIO = 4.0  # hidden channels of the MLP, in widths
WINDOW_PATTERN = "SSSL"  # attention of the blocks in turn: L sees all of the context, S a piece; the last is always L
SHORT_WINDOW = {"tiny": 0.5, "climbmix": 0.25}[PROFILE]  # S sees its own piece of the context, of about this part
ROPE_BASE = {"tiny": 10_000.0, "climbmix": 100_000.0}[PROFILE]  # longest wavelength of the rotary positions
QK_SCALE = {"tiny": 1.0, "climbmix": 1.15}[PROFILE]  # factor on normed queries and keys; more is sharper attention
SOFTCAP = 15.0  # logits are squashed into (-SOFTCAP, SOFTCAP)
GATE_CHANNELS = {"tiny": 32, "climbmix": 12}[PROFILE]  # channels that a value embedding's gate looks at
GATE_RANGE = {"tiny": 2.0, "climbmix": 3.0}[PROFILE]  # gates lie in (0, GATE_RANGE); half of it at the start

# Initialisation
EMBEDDING_STD = {"tiny": 1.0, "climbmix": 0.8}[PROFILE]  # token embedding, normal
UNEMBEDDING_STD = 0.001  # output head, normal
MATRIX_STD = 1.0  # q, k, v and value embeddings, uniform, in units of width**-0.5
MLP_STD = {"tiny": 1.0, "climbmix": 0.5}[PROFILE]  # MLP input, uniform, in the same units
RESID_LAMBDA = 1.0  # each block's weight of the residual stream
X0_LAMBDA = 0.1  # each block's weight of the embedding

# Attention kernels, the fastest first: on 2,048 tokens cuDNN's takes 17 ns a token on an H200, flash's 28
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def linear(x: Tensor, weight: Tensor) -> Tensor:  # weights are float32, activations bfloat16 where that is fast
    return F.linear(x, weight.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, width: int, head_dim: int, piece: int, gated: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.piece = piece  # tokens that look at each other, each at those before it
        heads = width // head_dim
        kv_heads = max(n for n in range(1, max(1, heads // KV_GROUP) + 1) if heads % n == 0)
        self.q = nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, kv_heads * head_dim, bias=False) for _ in range(2))
        self.proj = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(min(GATE_CHANNELS, width), kv_heads, bias=False) if gated else None

    def forward(self, x: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        weights = self.q.weight, self.k.weight, self.v.weight
        # [B, T, H, D] each; q and k with rotary positions, and normed
        q, k, v = fused.qkv_heads(x, *weights, cos, sin, self.head_dim, QK_SCALE)
        if self.gate is not None:
            gate = GATE_RANGE * torch.sigmoid(linear(x[..., : self.gate.in_features], self.gate.weight))
            v = v + gate.unsqueeze(-1) * value.view(v.shape)
        piece = min(self.piece, x.size(1))
        q, k, v = (heads.reshape(-1, piece, *heads.shape[2:]).transpose(1, 2) for heads in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) > k.size(1))
        return linear(y.transpose(1, 2).reshape(x.shape), self.proj.weight)


class Block(nn.Module):
    def __init__(self, width: int, head_dim: int, piece: int, gated: bool) -> None:
        super().__init__()
        hidden = 8 * math.ceil(MLP_RATIO * width / 8)
        self.attention = Attention(width, head_dim, piece, gated)
        self.fc = nn.Linear(width, hidden, bias=False)
        self.proj = nn.Linear(hidden, width, bias=False)

    def forward(
        self, x: Tensor, x0: Tensor, mix: tuple[Tensor, Tensor], value: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        x = mix[0] * x + mix[1] * x0
        x = x + self.attention(norm(x), value, cos, sin)
        return x + fused.relu2_mlp(norm(x), self.fc.weight, self.proj.weight)


class GPT(nn.Module):
    """Map tokens int64 [B, T] to logits float32 [B, T, V]; T at most `seq_len`."""

    cos: Tensor  # [T, D/2]
    sin: Tensor

    def __init__(self, vocab_size: int, seq_len: int) -> None:
        super().__init__()
        head_dim = 8 * math.ceil(HEAD_DIM / 8)  # sizes that are no multiple of 8 are slow on a GPU
        width = math.ceil(DEPTH * ASPECT_RATIO / head_dim) * head_dim
        pattern = (WINDOW_PATTERN * DEPTH)[: DEPTH - 1] + "L"
        if set(pattern) - {"S", "L"}:
            raise ValueError(f"WINDOW_PATTERN is {WINDOW_PATTERN!r}, use the letters S and L")
        gated = [layer % 2 == (DEPTH - 1) % 2 for layer in range(DEPTH)]  # every other block, the last among them
        self.seq_len = seq_len
        self.piece = math.ceil(seq_len / max(1, round(1 / SHORT_WINDOW)))
        whole = math.ceil(seq_len / self.piece) * self.piece
        pieces = [self.piece if letter == "S" else whole for letter in pattern]
        blocks = [Block(width, head_dim, pieces[i], gated[i]) for i in range(DEPTH)]
        self.blocks = nn.ModuleList(blocks)
        # One table for the token embedding and those of the blocks' values: its gradient sorts the tokens once
        kv_width = blocks[0].attention.v.out_features
        self.parts = [width, *(kv_width if gate else 0 for gate in gated)]
        self.embedding = nn.Embedding(vocab_size, sum(self.parts))
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.resid_lambdas = nn.Parameter(torch.full((DEPTH,), RESID_LAMBDA))
        self.x0_lambdas = nn.Parameter(torch.full((DEPTH,), X0_LAMBDA))

        # Tables that follow from the shapes alone
        position = torch.arange(whole, dtype=torch.float64)
        angle = torch.outer(position, ROPE_BASE ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim))
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        self.init_weights(width)

    @torch.no_grad()
    def init_weights(self, width: int) -> None:
        bound = math.sqrt(3 / width)  # uniform in (-bound, bound) has std width**-0.5
        nn.init.normal_(self.embedding.weight[:, :width], std=EMBEDDING_STD)
        nn.init.uniform_(self.embedding.weight[:, width:], -bound * MATRIX_STD, bound * MATRIX_STD)
        nn.init.normal_(self.head.weight, std=UNEMBEDDING_STD)
        for name, weight in self.blocks.named_parameters():
            if "proj" in name or "gate" in name:
                nn.init.zeros_(weight)
            else:
                scale = MLP_STD if "fc" in name else MATRIX_STD
                nn.init.uniform_(weight, -bound * scale, bound * scale)

    def hidden(self, tokens: Tensor, run_block=Block.forward) -> Tensor:  # type: ignore[no-untyped-def]
        """Map tokens [B, T] to what the output head reads [B, T, C]; `run_block` may be compiled."""
        length = tokens.size(1)
        if length > self.seq_len:
            raise ValueError(f"a row of {length} tokens, but the model was built for at most {self.seq_len}")
        if length > self.piece:  # fill up the last piece: nothing looks ahead at what is put there
            tokens = F.pad(tokens, (0, -length % self.piece))
        cos, sin = self.cos[: tokens.size(1)], self.sin[: tokens.size(1)]
        x, *values = self.embedding(tokens).split(self.parts, -1)
        x = x0 = norm(x)
        for i, block in enumerate(self.blocks):
            x = run_block(block, x, x0, (self.resid_lambdas[i], self.x0_lambdas[i]), values[i], cos, sin)
        return norm(x[:, :length])

    def forward(self, tokens: Tensor) -> Tensor:
        return fused.softcapped(linear(self.hidden(tokens), self.head.weight), SOFTCAP)


def build_model(spec: oracle.ModelSpec) -> nn.Module:
    with spec.device:  # weights are drawn where they stay
        model = GPT(spec.vocab_size, spec.seq_len)
    if spec.device.type == "cuda":  # what comes out of the embedding sets the precision of the activations
        model.embedding.bfloat16()
    return model


# -----------------------------------------------------------------------------
# Optimizer

TOTAL_BATCH_SIZE = {"tiny": 8_192, "climbmix": 262_144}[PROFILE]  # tokens a step
DEVICE_BATCH_SIZE = {"tiny": 16, "climbmix": 128}[PROFILE]  # rows a micro-batch, at most: fewer where memory is short

EMBEDDING_LR = 0.6  # token and value embeddings, x (width / 768)**-0.5
UNEMBEDDING_LR = {"tiny": 0.004, "climbmix": 0.008}[PROFILE]  # output head, scaled likewise
MATRIX_LR = 0.04  # block matrices (Muon)
RESID_LR = 0.005  # resid_lambdas
SCALAR_LR = 0.5  # x0_lambdas
ADAM_BETA1 = 0.8  # embeddings, head, resid_lambdas
ADAM_BETA2 = 0.95  # all that AdamW trains
SCALAR_BETA1 = 0.96  # x0_lambdas
ADAM_EPS = 1e-10
WEIGHT_DECAY = {"tiny": 0.2, "climbmix": 0.28}[PROFILE]  # block matrices, falling to 0 over the run
MUON_MOMENTUM_START = 0.85  # at step 0
MUON_MOMENTUM = {"tiny": 0.95, "climbmix": 0.97}[PROFILE]  # from step MUON_MOMENTUM_STEPS on
MUON_MOMENTUM_STEPS = {"tiny": 300, "climbmix": 400}[PROFILE]
MUON_BETA2 = {"tiny": 0.95, "climbmix": 0.9}[PROFILE]  # variance reduction
MUON_STEPS = 5  # Polar Express iterations
MUON_NORM_MARGIN = {"tiny": 0.02, "climbmix": 0.01}[PROFILE]  # safety margin on the norm that they start from

WARMUP_RATIO = {"tiny": 0.0, "climbmix": 0.02}[PROFILE]  # share of the budget in which learning rates rise from 0
WARMDOWN_RATIO = {"tiny": 0.5, "climbmix": 0.65}[PROFILE]  # share of the budget in which they fall
FINAL_LR_FRAC = {"tiny": 0.0, "climbmix": 0.05}[PROFILE]  # to this fraction


def build_optimizer(model: GPT) -> optim.MuonAdamW:
    scale = (model.head.in_features / 768) ** -0.5
    adamw = {"kind": "adamw", "betas": (ADAM_BETA1, ADAM_BETA2), "eps": ADAM_EPS}
    return optim.MuonAdamW(
        [
            {**adamw, "params": [model.head.weight], "lr": UNEMBEDDING_LR * scale},
            {**adamw, "params": [model.embedding.weight], "lr": EMBEDDING_LR * scale},
            {**adamw, "params": [model.resid_lambdas], "lr": RESID_LR},
            {**adamw, "params": [model.x0_lambdas], "lr": SCALAR_LR, "betas": (SCALAR_BETA1, ADAM_BETA2)},
            {
                "kind": "muon",
                "params": list(model.blocks.parameters()),
                "lr": MATRIX_LR,
                "beta2": MUON_BETA2,
                "steps": MUON_STEPS,
                "norm_factor": 1 + MUON_NORM_MARGIN,
            },
        ]
    )


# -----------------------------------------------------------------------------
# Training


def micro_batch(model: GPT, device: torch.device) -> int:
    """Choose the rows of a micro-batch: DEVICE_BATCH_SIZE, halved until a step fits into the device's memory."""
    rows = DEVICE_BATCH_SIZE
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory * torch.cuda.get_per_process_memory_fraction()
        row_bytes = (24 + 2 * MLP_RATIO) * DEPTH * model.head.in_features * model.seq_len  # activations
        rest = 2 * 2**30 + 24 * sum(weight.numel() for weight in model.parameters())  # a chunk of logits, the optimizer
        while rows > 1 and rows * row_bytes > memory - rest:
            rows //= 2
    return rows


def train(run: oracle.Run) -> nn.Module:
    torch.manual_seed(run.seed)
    model = build_model(run.spec)
    assert isinstance(model, GPT)
    optimizer = build_optimizer(model)
    rows = micro_batch(model, run.device)
    accumulation = max(1, round(TOTAL_BATCH_SIZE / (rows * run.spec.seq_len)))  # micro-batches a step
    on_cuda = run.device.type == "cuda"
    if on_cuda:
        torch.set_float32_matmul_precision("high")
    # Blocks are compiled, not the whole model: most are alike, so that it starts sooner
    compiles = on_cuda and importlib.util.find_spec("triton") is not None
    run_block = torch.compile(Block.forward, dynamic=False) if compiles else Block.forward

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with sdpa_kernel(ATTENTION, set_priority=True):
            x = model.hidden(inputs, run_block)
        return fused.softcapped_cross_entropy(x, model.head.weight, targets, SOFTCAP)

    # Warm up (and compile) before the clock starts, leaving no trace in weights or random state
    with torch.random.fork_rng([run.device] if on_cuda else []):
        loss_of(*run.dummy_batch(rows)).backward()  # type: ignore[no-untyped-call]
    optimizer.zero_grad()
    # The garbage collector's pauses cost steps: collect now, and rarely from here on
    gc.collect()
    gc.freeze()
    gc.disable()

    step, micro_steps = 0, 0
    loss_sum = torch.zeros((), device=run.device)
    smooth_loss = 0.0

    def report(step: int, lr: float, loss: Tensor, arrived: torch.cuda.Event | None) -> None:
        nonlocal smooth_loss
        if arrived is not None:
            arrived.synchronize()
        smooth_loss = 0.9 * smooth_loss + 0.1 * loss.item()
        run.log(step, loss, lr=lr, smooth=smooth_loss / (1 - 0.9**step))

    launched: tuple[int, float, Tensor, torch.cuda.Event | None] | None = None
    for inputs, targets, _ in run.batches(rows):
        loss = loss_of(inputs, targets) / accumulation
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

        # The loss goes to the host while the GPU works on: the last step is reported, the next batch is fetched
        if launched is not None:
            report(*launched)
        step += 1
        arrived = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]
        launched = step, MATRIX_LR * multiplier, loss_sum.to("cpu", non_blocking=on_cuda, copy=True), arrived
        if arrived is not None:
            arrived.record()
        loss_sum.zero_()
        if step % 5_000 == 0:
            gc.collect()
    if launched is not None:
        report(*launched)
    gc.enable()
    return model


if __name__ == "__main__":
    oracle.main(build_model, train)
