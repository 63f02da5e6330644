"""
Mistral 7B (Jiang et al. 2023, arXiv 2310.06825) at the size of GPT-2 124M. It differs from LLaMA 3
in two points:
- Attention has a sliding window in every layer: a position sees itself and the window - 1 positions
  before it, as in Mistral's code; section 2 of the paper has one position more. What is older
  reaches it through the layers below, from up to n_layer * (window - 1) positions back.
- The base of the rotary wavelengths, theta, is 10,000.
RMSNorm, rotary positions, four query heads per key-value head, SwiGLU and the lack of biases are as
in LLaMA. The 7B model has a window of 4,096 in a context of 8,192. Here it is 256 in 1,024, a
quarter instead of a half, so that its effect shows. The model has 123,587,328 parameters.

What to expect: results close to LLaMA's. The window acts directly on the validation loss, whose
rows are 1,024 tokens long. HellaSwag's texts are shorter than the window, so there it acts only
through what the model has learned. A gap to LLaMA or Phi-4 of less than a point of HellaSwag is
noise until several seeds confirm it.

Run it:
  python train_mistral.py --tiny                # a small model on built-in text, minutes on a CPU
  python train_mistral.py                       # one GPU, after python fineweb.py
  torchrun --nproc_per_node=8 train_mistral.py  # eight GPUs: the same result, sooner
  torchrun --nproc_per_node=8 train_mistral.py --resume=auto
  python train_mistral.py --sample="Hello, I'm a language model,"
and on each of two nodes, where HOST is the address of one of them:
  torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST train_mistral.py
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.parallel import DistributedDataParallel as DDP

from common import (RunConfig, ShardLoader, accumulation_steps, configure_compiler, cosine_lr,
                    init_world, parse_args, row_losses)
from fineweb import get_tokenizer, one_line_errors, vocab_of
from hellaswag import load_hellaswag
from muon import Muon, Optimizers
from run import Run, check_memory, use_checkpoint

ARCH = "mistral"


@dataclass
class Config(RunConfig):
    # model
    block_size: int = 1024  # context length in tokens
    vocab_size: int = 50304  # size of the embedding; by default the tokens of data_dir and padding
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # number of query heads
    n_kv_head: int = 3  # number of key-value heads; 4 query heads share one, as in the 7B model
    n_embd: int = 768  # width of the residual stream
    ffn_dim: int = 2432  # hidden width of the MLP
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    norm_eps: float = 1e-5  # epsilon of RMSNorm
    window: int = 256  # number of tokens that attention sees, its own included
    # training
    total_batch_size: int = 524288  # tokens per step
    batch_size: int = 64  # sequences per device and micro-batch; lower it if memory runs out
    max_steps: int = 19073  # number of steps; by default 10.0B of FineWeb 10BT's 10.3B tokens
    warmup_steps: int = 715  # steps of linear warm-up; by default 375M tokens, as GPT-3
    learning_rate: float = 6e-4  # peak learning rate (GPT-3, table 2.1)
    min_lr_ratio: float = 0.1  # learning rate at the end of the cosine, as a fraction of the peak
    weight_decay: float = 0.1  # weight decay of matrices and embeddings
    beta1: float = 0.9  # AdamW: decay rate of the running mean of gradients
    beta2: float = 0.95  # AdamW: decay rate of the running mean of squares
    grad_clip: float = 1.0  # largest global norm of the gradient; 0: no clipping
    optimizer: str = "adamw"  # adamw, or muon for the matrices in the blocks and AdamW for the rest
    embd_lr: float = 1.0  # multiple of the learning rate for the embedding
    matrix_lr: float = 1.0  # the same for the matrices in the blocks
    vector_lr: float = 1.0  # the same for all other parameters
    # run: see RunConfig in common.py
    log_dir: str = f"log/{ARCH}"

    def __post_init__(self):
        if self.n_head < 1 or self.n_embd % (2 * self.n_head):
            raise ValueError(f"--n_embd={self.n_embd} must be a multiple of twice "
                             f"--n_head={self.n_head}: positions rotate pairs within a head")
        if self.n_kv_head < 1 or self.n_head % self.n_kv_head:
            raise ValueError(f"--n_head={self.n_head} is not a multiple of "
                             f"--n_kv_head={self.n_kv_head}")
        if self.window < 1:
            raise ValueError(f"--window={self.window}: a position sees at least itself")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head


TINY = dict(block_size=64, n_layer=4, n_head=4, n_kv_head=2, n_embd=128,
            ffn_dim=384, window=16, log_dir=f"log/{ARCH}-tiny")


class RMSNorm(nn.Module):
    """Computes x / rms(x) in fp32, rounds it to the type of x, and multiplies it by the weight (as
    mistral-src/mistral/model.py)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float()
        y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).type_as(x)
        return (self.weight * y).type_as(x)  # autocast leaves the weight in fp32


def rope_table(block_size, dim, theta):
    """Return cosine and sine of position * theta^(-2 i / dim): (2, block_size, dim / 2)."""
    angles = torch.outer(torch.arange(block_size), 1 / theta ** (torch.arange(0, dim, 2) / dim))
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x, rope):
    """Rotate each pair (x_i, x_{i + D/2}) by its angle: x (B, T, H, D), rope (2, T, D/2).

    Mistral's code pairs neighbours instead, which is the same with permuted rows of q_proj and
    k_proj; this is the order of Hugging Face's weights."""
    cos, sin = rope[:, :, None]  # (T, 1, D/2): the same for all heads
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


def window_block_mask(T, window, device):
    """Return flex_attention's mask: which blocks of 128 x 128 scores the window touches, and which
    scores inside them count."""
    def in_window(b, h, i, j):
        return (j <= i) & (i - j < window)

    return create_block_mask(in_window, None, None, T, T, device=device)


def sliding_window_attention(q, k, v, window, block_mask=None):
    """Return causal attention in which position i sees positions i - window + 1 to i:
    q (B, H, T, D), k and v (B, H_kv, T, D) -> (B, H, T, D). Mistral's cache.py, Google's
    gemma_pytorch and transformers do the same; the text of Mistral's paper has one position more.

    With a block_mask it uses flex_attention, which skips what lies outside the window, but needs a
    compiled model and, for gradients, CUDA. Otherwise it works on blocks of `window` queries, each
    against its own keys and those of the block before: 2 * window scores per query, not T."""
    B, _, T, _ = q.shape
    if block_mask is not None and torch.compiler.is_compiling():
        return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
    # the first block of queries has no block of keys before it
    first = F.scaled_dot_product_attention(
        q[:, :, :window], k[:, :, :window], v[:, :, :window], is_causal=True, enable_gqa=True)
    if T <= window:
        return first
    n = math.ceil(T / window) - 1  # blocks after the first

    def blocks(x, start, size):
        """Cut n pieces of `size` positions out of x, every `window` positions from `start` on:
        (B, H, T, D) -> (B * n, H, size, D)."""
        x = F.pad(x[:, :, start:], (0, 0, 0, (n + 1) * window - T))
        return x.unfold(2, size, window).permute(0, 2, 1, 4, 3).flatten(0, 1)

    # within a block of queries and its 2 * window keys, query i sees keys i + 1 to i + window
    band = torch.ones(window, 2 * window, dtype=torch.bool, device=q.device)
    band = band.triu(1).tril(window)
    y = F.scaled_dot_product_attention(
        blocks(q, window, window), blocks(k, 0, 2 * window), blocks(v, 0, 2 * window),
        attn_mask=band, enable_gqa=True)
    y = y.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, y], dim=2)[:, :, :T]


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.head_dim, self.window = cfg.head_dim, cfg.window
        self.q_proj = nn.Linear(cfg.n_embd, cfg.n_head * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.n_embd, cfg.n_kv_head * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.n_embd, cfg.n_kv_head * cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.n_head * cfg.head_dim, cfg.n_embd, bias=False)

    def forward(self, x, rope, block_mask):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, n_head, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, n_kv_head, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        q, k = rotate(q, rope), rotate(k, rope)
        # transposed only here, so that y has the memory order of x and o_proj needs no copy
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = sliding_window_attention(q, k, v, self.window, block_mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.n_embd, cfg.ffn_dim, bias=False)
        self.up_proj = nn.Linear(cfg.n_embd, cfg.ffn_dim, bias=False)
        self.down_proj = nn.Linear(cfg.ffn_dim, cfg.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, rope, block_mask):
        x = x + self.self_attn(self.input_layernorm(x), rope, block_mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """Parameters carry the names of Hugging Face's Mistral."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(cfg.vocab_size, cfg.n_embd),
            layers=nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer)),
            norm=RMSNorm(cfg.n_embd, cfg.norm_eps)))
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight
        rope = rope_table(cfg.block_size, cfg.head_dim, cfg.rope_theta)
        self.register_buffer("rope", rope, persistent=False)
        self.block_mask = None  # flex_attention's mask for T = block_size; set by compile() on CUDA
        for name, p in self.named_parameters():
            if p.dim() == 2:  # GPT-2's initialisation, as the paper gives none
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.n_layer) if residual else 0.02)

    def compile(self, **options):
        """Compile each block and the loss separately. The blocks share a graph, so that this
        takes seconds; DDP sums a block's gradients while those of the block before are computed.
        On CUDA this also makes flex_attention's mask, unless head_dim is below its minimum, 16."""
        device = self.lm_head.weight.device
        if device.type == "cuda" and self.cfg.head_dim >= 16:
            self.block_mask = window_block_mask(self.cfg.block_size, self.cfg.window, device)
        for module in [*self.model.layers, self.model.norm]:
            module.compile(**options)
        self.loss = torch.compile(self.loss, **options)

    def hidden(self, idx):
        """Return what lm_head turns into logits: idx int64 (B, T) -> (B, T, C)."""
        x = self.model.embed_tokens(idx)
        if torch.is_autocast_enabled(idx.device.type):
            # a bf16 residual stream halves the memory traffic between matrix products
            x = x.to(torch.get_autocast_dtype(idx.device.type))
        T = idx.size(1)
        block_mask = self.block_mask if T == self.cfg.block_size else None
        for block in self.model.layers:
            x = block(x, self.rope[:, :T], block_mask)
        return self.model.norm(x)

    def forward(self, idx, targets=None):
        """Return (logits, None), or (None, loss) if there are targets.

        idx and targets: int64 (B, T), where a target of -1 does not count. logits: float32
        (B, T, vocab_size). loss: the mean cross-entropy of the next token, a scalar."""
        hidden = self.hidden(idx)
        if targets is None:
            return self.lm_head(hidden).float(), None
        return None, self.loss(hidden, targets)

    def loss(self, hidden, targets):
        logits = self.lm_head(hidden).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def num_params(self):
        total = sum(p.numel() for p in self.parameters())
        embedding = self.lm_head.weight.numel()
        return {"total": total, "active": total, "non_embedding": total - embedding}

    def flops_per_token(self):
        """Return the FLOPs of forward and backward pass: 6 N + 12 L d W (PaLM paper, appendix B). N
        counts all parameters, the tied embedding once, as the head; W is the window."""
        cfg = self.cfg
        window = min(cfg.window, cfg.block_size)
        return 6 * self.num_params()["total"] + 12 * cfg.n_layer * cfg.n_embd * window

    def configure_optimizers(self, cfg, device_type):
        """Return a fused AdamW, with weight decay for matrices and the embedding but not for norms.
        With --optimizer=muon the matrices inside the blocks go to Muon instead."""
        embd = {"params": [self.model.embed_tokens.weight],
                "weight_decay": cfg.weight_decay, "lr_scale": cfg.embd_lr}
        matrices = {"params": [p for p in self.model.layers.parameters() if p.dim() == 2],
                    "weight_decay": cfg.weight_decay, "lr_scale": cfg.matrix_lr}
        vectors = {"params": [p for p in self.parameters() if p.dim() < 2],
                   "weight_decay": 0.0, "lr_scale": cfg.vector_lr}
        muon = cfg.optimizer == "muon"
        adamw = torch.optim.AdamW(
            [embd, vectors] if muon else [embd, matrices, vectors], lr=cfg.learning_rate,
            betas=(cfg.beta1, cfg.beta2), eps=1e-8, fused=device_type in ("cuda", "cpu"))
        return Optimizers([adamw, Muon([matrices], lr=cfg.learning_rate)]) if muon else adamw


def to_hf(model):
    """Return a transformers MistralForCausalLM with the same weights."""
    from transformers import MistralConfig, MistralForCausalLM
    cfg = model.cfg
    config = MistralConfig(
        vocab_size=cfg.vocab_size, max_position_embeddings=cfg.block_size, hidden_size=cfg.n_embd,
        intermediate_size=cfg.ffn_dim, num_hidden_layers=cfg.n_layer,
        num_attention_heads=cfg.n_head, num_key_value_heads=cfg.n_kv_head,
        sliding_window=cfg.window, rms_norm_eps=cfg.norm_eps, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        bos_token_id=None, eos_token_id=None, pad_token_id=None)
    # where transformers 4, vLLM and llama.cpp look for it
    config.rope_theta = cfg.rope_theta
    hf = MistralForCausalLM(config)
    hf.load_state_dict(model.state_dict())
    return hf


@one_line_errors()
def main():
    cfg, mode = parse_args(Config, TINY)
    # ==== training loop: identical in every train_*.py ====
    if mode.sample is not None or mode.export is not None:
        return use_checkpoint(cfg, mode, ARCH, Config, Model, to_hf)
    world = init_world(cfg.device, cfg.dtype, cfg.seed)
    accumulation = accumulation_steps(cfg, world)
    train_loader = ShardLoader(cfg, "train", world, synthetic=mode.bench)
    tokenizer = None if mode.bench else get_tokenizer(vocab_of(cfg.data_dir), cfg.vocab_size)
    val_loader = ShardLoader(cfg, "val", world, tokenizer, synthetic=mode.bench)
    hellaswag = load_hellaswag(cfg, world, tokenizer)
    check_memory(cfg, world, Model, accumulation)
    model = Model(cfg).to(world.device)
    optimizer = model.configure_optimizers(cfg, world.device.type)
    # float16 has a narrow range: the loss is scaled, and an update with an overflow is skipped
    scaler = torch.amp.GradScaler(world.device.type, enabled=cfg.dtype == "float16")
    # this loads the checkpoint that --resume names
    run = Run(cfg, ARCH, world, model, optimizer, scaler, val_loader, hellaswag, mode.bench)
    if cfg.compile:
        configure_compiler()
        model.compile(dynamic=False, fullgraph=True)
    ddp_model = model
    if world.size > 1:
        device_ids = None if world.device.type == "cpu" else [world.device]
        ddp_model = DDP(model, device_ids=device_ids, gradient_as_bucket_view=True,
                        bucket_cap_mb=100, broadcast_buffers=False)
    batches = train_loader.train_batches(run.start_step, accumulation)

    for step in range(run.start_step, cfg.max_steps + 1):  # `step` updates have been made
        last_step = step == cfg.max_steps

        # evaluate (a stopped run is evaluated after it resumes)
        if run.evaluation_due(step) and not run.stopping:
            run.flush()  # a run that has diverged ends here
            model.eval()
            streams = {"val": val_loader.val_tokens}
            if last_step and cfg.val_full_tokens:
                streams["val_full"] = cfg.val_full_tokens
            for stream, n_tokens in streams.items():
                table = val_loader.loss_table(n_tokens)
                with torch.no_grad(), world.autocast():
                    for rows, x, y in run.until_signal(val_loader.val_batches(n_tokens)):
                        table[rows] = row_losses(model, x, y, val_loader.token_bytes)
                run.log_val(step, stream, table)
            if hellaswag:
                run.log_hella(step, hellaswag.losses(model, run.until_signal))
            model.train()

        # sample
        if tokenizer and cfg.sample_interval and step and step % cfg.sample_interval == 0:
            run.show_sample(step, tokenizer)

        # save
        checkpoint_due = cfg.checkpoint_interval and step % cfg.checkpoint_interval == 0
        if last_step or run.stopping or (checkpoint_due and step > run.start_step):
            run.save(step)
        if last_step or run.stopping:
            break

        # train
        run.begin_update()
        lr = cosine_lr(cfg, step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]  # --embd_lr, --matrix_lr and so on
        train_loss = torch.zeros((), device=world.device)
        for micro_step in range(accumulation):
            x, y = next(batches)
            # DDP averages the gradients over the processes only in the last micro-step
            if world.size > 1:
                ddp_model.require_backward_grad_sync = micro_step == accumulation - 1
            with world.autocast():
                _, loss = ddp_model(x, y)
                loss = loss / accumulation
            scaler.scale(loss).backward()
            train_loss += loss.detach()
        scaler.unscale_(optimizer)
        # 0 means no clipping
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or torch.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.log_train(step, train_loss, norm, lr)
    del ddp_model  # DDP must go before the process group, or the shutdown can deadlock
    run.close()
    # ==== end of training loop ====


if __name__ == "__main__":
    main()
