"""
The laboratory: one transformer whose ingredients are options, from GPT-2's to LLaMA 3's, so that
one can change an ingredient at a time and see what it is worth. Without options it is the model of
train_llama.py, with the same log.
- --pos: learned positions (GPT-2), rope (arXiv 2104.09864), or none (arXiv 2203.16634).
- --norm: layernorm, or rmsnorm (arXiv 1910.07467). --bias: in linear layers and LayerNorm.
- --mlp: gelu (GPT-2), swiglu or geglu (arXiv 2002.05202), or relu2, which is relu(x)^2 (Primer,
  arXiv 2109.08668).
- --n_kv_head: key-value heads that the query heads share (arXiv 2305.13245).
- --qk_norm: a norm of queries and keys, head by head, before they are rotated (as in Qwen3).
- --window_pattern: S is a layer with a sliding window of --window positions, L one without; SL
  alternates them. The layers repeat the pattern.
- --share: so many layers share the weights of attention and MLP; each has its own norms.
  --share_order=immediate: layers that follow each other share (MobileLLM, arXiv 2402.14905); cycle:
  the blocks take turns, as the only one of the Universal Transformer does (arXiv 1807.03819).
- --rank: each projection is a product of two matrices of this rank. --embd_rank: so are the
  embedding (ALBERT, arXiv 1909.11942) and the head, which share the larger one unless --tie=false.
- --zero_init: what is added to the residual stream starts at zero.
To compare fairly, keep the number of parameters: at the default size the MLP is 3,072 wide (gelu,
relu2) or 2,048 (swiglu, geglu), and with 3 key-value heads 3,648 or 2,432.

Run it:
  python train_hybrid.py --tiny                # a small model on built-in text, minutes on a CPU
  python train_hybrid.py --pos=learned --norm=layernorm --mlp=gelu --bias --n_kv_head=12 \
    --ffn_dim=3072                             # GPT-2
  torchrun --nproc_per_node=8 train_hybrid.py  # eight GPUs
  torchrun --nproc_per_node=8 train_hybrid.py --resume=auto
  python train_hybrid.py --sample="Hello, I'm a language model,"
and on each of two nodes, where HOST is the address of one of them:
  torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST train_hybrid.py
"""
import math
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.parallel import DistributedDataParallel as DDP

from common import (RunConfig, ShardLoader, accumulation_steps, configure_compiler, cosine_lr,
                    init_world, parse_args, row_losses)
from fineweb import fail, get_tokenizer, one_line_errors, vocab_of
from hellaswag import load_hellaswag
from muon import Muon, Optimizers
from run import Run, check_memory, use_checkpoint

ARCH = "hybrid"


@dataclass
class Config(RunConfig):
    # model
    block_size: int = 1024  # context length in tokens
    vocab_size: int = 50304  # size of the embedding; by default the tokens of data_dir and padding
    n_layer: int = 12  # number of passes through a block
    n_head: int = 12  # number of query heads
    n_embd: int = 768  # width of the residual stream
    pos: str = "rope"  # positions: learned, rope or none
    norm: str = "rmsnorm"  # layernorm or rmsnorm
    mlp: str = "swiglu"  # gelu, swiglu, geglu or relu2
    bias: bool = False  # biases in linear layers and in LayerNorm
    n_kv_head: int = 3  # number of key-value heads
    ffn_dim: int = 2432  # hidden width of the MLP
    rope_theta: float = 500000.0  # base of the rotary wavelengths
    norm_eps: float = 1e-5  # epsilon of the norms
    qk_norm: str = "none"  # norm of queries and keys: none, rmsnorm or layernorm
    window_pattern: str = "L"  # layers with (S) and without a window (L), repeated
    window: int = 256  # positions that a query sees in a layer S, its own included
    share: int = 1  # layers that share their weights, but not their norms
    share_order: str = "immediate"  # which ones: immediate (neighbours) or cycle
    rank: int = 0  # rank of the projections; 0: full
    embd_rank: int = 0  # rank of the embedding and the head; 0: full
    tie: bool = True  # the head has the embedding's weights
    zero_init: bool = False  # projections to the residual stream start at zero
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
    embd_lr: float = 1.0  # multiple of the learning rate for the embeddings
    head_lr: float = 1.0  # the same for the head, if it is not tied
    matrix_lr: float = 1.0  # the same for the matrices in the blocks
    vector_lr: float = 1.0  # the same for all other parameters
    # run: see RunConfig in common.py
    log_dir: str = f"log/{ARCH}"
    limits = RunConfig.limits | dict.fromkeys(("rank", "embd_rank"), (0, 2**40))

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"--{name}={getattr(self, name)} is unknown: use "
                                 f"{', '.join(known)}")
        if self.n_head < 1 or self.n_embd % (2 * self.n_head):
            raise ValueError(f"--n_embd={self.n_embd} must be a multiple of twice "
                             f"--n_head={self.n_head}: positions rotate pairs within a head")
        if self.n_kv_head < 1 or self.n_head % self.n_kv_head:
            raise ValueError(f"--n_head={self.n_head} is not a multiple of "
                             f"--n_kv_head={self.n_kv_head}")
        if not re.fullmatch("[SL]+", self.window_pattern):
            raise ValueError(f"--window_pattern={self.window_pattern} must consist of S and L")
        if self.n_layer % self.share:
            raise ValueError(f"--n_layer={self.n_layer} is not a multiple of --share={self.share}")
        if self.share == 1 and self.share_order == "cycle":
            raise ValueError("--share_order=cycle needs --share=2 or more: now no layers share")
        if self.pos != "rope" and self.rope_theta != Config.rope_theta:
            raise ValueError(f"--rope_theta={self.rope_theta} needs --pos=rope")
        if max(self.rank, self.embd_rank) > self.n_embd:
            raise ValueError("--rank and --embd_rank cannot be above the width, "
                             f"--n_embd={self.n_embd}: leave them out for full rank")
        if self.tie and self.head_lr != 1:
            raise ValueError(f"--head_lr={self.head_lr} needs --tie=false: a tied head learns with "
                             "the embedding")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def layer_kinds(self):
        """S or L for each layer."""
        return (self.window_pattern * self.n_layer)[:self.n_layer]


CHOICES = {"pos": ("learned", "rope", "none"), "norm": ("layernorm", "rmsnorm"),
           "mlp": ("gelu", "swiglu", "geglu", "relu2"), "share_order": ("immediate", "cycle"),
           "qk_norm": ("none", "rmsnorm", "layernorm")}
TINY = dict(block_size=64, n_layer=4, n_head=4, n_kv_head=2, n_embd=128,
            ffn_dim=384, window=16, log_dir=f"log/{ARCH}-tiny")


class Norm(nn.Module):
    """LayerNorm; or x / rms(x), computed in fp32 and rounded to the type of x, times the weight."""

    def __init__(self, kind, dim, cfg):
        super().__init__()
        self.kind, self.eps = kind, cfg.norm_eps
        self.weight = nn.Parameter(torch.ones(dim))
        has_bias = kind == "layernorm" and cfg.bias
        self.bias = nn.Parameter(torch.zeros(dim)) if has_bias else None

    def forward(self, x):
        if self.kind == "layernorm":
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps).type_as(x)
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


def linear(n_in, n_out, cfg):
    """Return a linear layer, or two in a row whose product has the rank cfg.rank."""
    if cfg.rank == 0:
        return nn.Linear(n_in, n_out, bias=cfg.bias)
    return nn.Sequential(nn.Linear(n_in, cfg.rank, bias=False),
                         nn.Linear(cfg.rank, n_out, bias=cfg.bias))


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.q_proj = linear(cfg.n_embd, cfg.n_head * cfg.head_dim, cfg)
        self.k_proj = linear(cfg.n_embd, cfg.n_kv_head * cfg.head_dim, cfg)
        self.v_proj = linear(cfg.n_embd, cfg.n_kv_head * cfg.head_dim, cfg)
        self.o_proj = linear(cfg.n_head * cfg.head_dim, cfg.n_embd, cfg)
        self.has_norms = cfg.qk_norm != "none"
        if self.has_norms:
            self.q_norm = Norm(cfg.qk_norm, cfg.head_dim, cfg)
            self.k_norm = Norm(cfg.qk_norm, cfg.head_dim, cfg)

    def forward(self, x, rope, window, block_mask):
        """rope is None without rotary positions, window in layers without one."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, n_head, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, n_kv_head, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if self.has_norms:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        # transposed only here, so that y has the memory order of x and o_proj needs no copy
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if window:
            y = sliding_window_attention(q, k, v, window, block_mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.kind = cfg.mlp
        if cfg.mlp in ("swiglu", "geglu"):
            self.gate_proj = linear(cfg.n_embd, cfg.ffn_dim, cfg)
        self.up_proj = linear(cfg.n_embd, cfg.ffn_dim, cfg)
        self.down_proj = linear(cfg.ffn_dim, cfg.n_embd, cfg)

    def forward(self, x):
        if self.kind == "swiglu":
            y = F.silu(self.gate_proj(x)) * self.up_proj(x)
        elif self.kind == "geglu":
            y = F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x)
        elif self.kind == "gelu":
            y = F.gelu(self.up_proj(x), approximate="tanh")
        else:
            y = F.relu(self.up_proj(x)).square()
        return self.down_proj(y)


class Block(nn.Module):
    """One pass. Its attention and MLP are those of the block `shared`, if there is one."""

    def __init__(self, cfg, layer, shared):
        super().__init__()
        self.window = cfg.window if cfg.layer_kinds[layer] == "S" else None
        self.input_layernorm = Norm(cfg.norm, cfg.n_embd, cfg)
        self.self_attn = shared.self_attn if shared else Attention(cfg)
        self.post_attention_layernorm = Norm(cfg.norm, cfg.n_embd, cfg)
        self.mlp = shared.mlp if shared else MLP(cfg)

    def forward(self, x, rope, block_mask):
        x = x + self.self_attn(self.input_layernorm(x), rope, self.window, block_mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """Parameters carry the names of Hugging Face's LLaMA, where it has them."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        width = cfg.embd_rank or cfg.n_embd  # of the embedding
        self.model = nn.ModuleDict(dict(embed_tokens=nn.Embedding(cfg.vocab_size, width)))
        if cfg.pos == "learned":
            self.model["embed_positions"] = nn.Embedding(cfg.block_size, cfg.n_embd)
        layers = nn.ModuleList()
        for layer in range(cfg.n_layer):
            n_own = cfg.n_layer // cfg.share  # number of blocks with weights of their own
            first = layer % n_own if cfg.share_order == "cycle" else layer // cfg.share * cfg.share
            layers.append(Block(cfg, layer, layers[first] if first < layer else None))
        self.model["layers"] = layers
        self.model["norm"] = Norm(cfg.norm, cfg.n_embd, cfg)
        if cfg.embd_rank:
            self.model["project_in"] = nn.Linear(cfg.embd_rank, cfg.n_embd, bias=False)
            self.model["project_out"] = nn.Linear(cfg.n_embd, cfg.embd_rank, bias=False)
        self.lm_head = nn.Linear(width, cfg.vocab_size, bias=False)
        if cfg.tie:
            self.lm_head.weight = self.model.embed_tokens.weight
        rope = rope_table(cfg.block_size, cfg.head_dim, cfg.rope_theta)
        self.register_buffer("rope", rope, persistent=False)
        self.block_mask = None  # flex_attention's mask for T = block_size; set by compile() on CUDA
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=self.initial_std(name))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def initial_std(self, name):
        """Return the standard deviation with which a matrix starts: GPT-2's. The two factors of a
        product start so that their product has it."""
        cfg, std = self.cfg, 0.02
        if ".o_proj." in name or ".down_proj." in name:
            if cfg.zero_init and not name.endswith(".0.weight"):  # two zero factors never learn
                return 0.0
            std = 0.02 / math.sqrt(2 * cfg.n_layer)
        if name.endswith((".0.weight", ".1.weight")):
            return math.sqrt(std / math.sqrt(cfg.rank))
        if cfg.embd_rank and re.search("embed_tokens|project_|lm_head", name):
            return math.sqrt(std / math.sqrt(cfg.embd_rank))
        return std

    def compile(self, **options):
        """Compile each block and the loss separately. Blocks of a kind share a graph, so that this
        takes seconds; DDP sums a block's gradients while those of the block before are computed.
        On CUDA this also makes flex_attention's mask, unless head_dim is below its minimum, 16."""
        device = self.lm_head.weight.device
        if device.type == "cuda" and self.cfg.head_dim >= 16 and "S" in self.cfg.layer_kinds:
            self.block_mask = window_block_mask(self.cfg.block_size, self.cfg.window, device)
        for module in [*self.model.layers, self.model.norm]:
            module.compile(**options)
        self.loss = torch.compile(self.loss, **options)

    def hidden(self, idx):
        """Return what lm_head turns into logits: idx int64 (B, T) -> (B, T, C), or (B, T,
        embd_rank)."""
        T = idx.size(1)
        x = self.model.embed_tokens(idx)
        if self.cfg.embd_rank:
            x = self.model.project_in(x)
        if self.cfg.pos == "learned":
            x = x + self.model.embed_positions.weight[:T]
        if torch.is_autocast_enabled(idx.device.type):
            # a bf16 residual stream halves the memory traffic between matrix products
            x = x.to(torch.get_autocast_dtype(idx.device.type))
        rope = self.rope[:, :T] if self.cfg.pos == "rope" else None
        block_mask = self.block_mask if T == self.cfg.block_size else None
        for block in self.model.layers:
            x = block(x, rope, block_mask)
        x = self.model.norm(x)
        return self.model.project_out(x) if self.cfg.embd_rank else x

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
        """Count shared weights once."""
        total = sum(p.numel() for p in self.parameters())
        outer = {p for name, p in self.named_parameters()
                 if re.search("embed_|project_|lm_head", name)}
        return {"total": total, "active": total,
                "non_embedding": total - sum(p.numel() for p in outer)}

    def flops_per_token(self):
        """Return the FLOPs of forward and backward pass: 6 N + 12 d S (PaLM paper, appendix B), for
        N parameters in matrix products, shared ones once a pass, width d, and S positions seen in
        all layers together."""
        model, cfg = self.model, self.cfg
        used = [p for block in model.layers for p in block.parameters()]
        used += [*model.norm.parameters(), self.lm_head.weight]
        if cfg.embd_rank:
            used += [model.project_in.weight, model.project_out.weight]
        seen = sum(min(block.window or cfg.block_size, cfg.block_size) for block in model.layers)
        return 6 * sum(p.numel() for p in used) + 12 * cfg.n_embd * seen

    def configure_optimizers(self, cfg, device_type):
        """Return a fused AdamW, with weight decay for matrices and embeddings but not for norms and
        biases. With --optimizer=muon the matrices between embedding and head go to Muon instead."""
        kinds = {"embd": [], "head": [], "matrix": [], "vector": []}
        for name, p in self.named_parameters():
            if "embed_" in name:
                kinds["embd"].append(p)
            elif "lm_head" in name:
                kinds["head"].append(p)
            else:
                kinds["matrix" if p.dim() == 2 else "vector"].append(p)
        groups = {kind: {"params": params, "lr_scale": getattr(cfg, f"{kind}_lr"),
                         "weight_decay": 0.0 if kind == "vector" else cfg.weight_decay}
                  for kind, params in kinds.items() if params}
        muon = [groups.pop("matrix")] if cfg.optimizer == "muon" else []
        adamw = torch.optim.AdamW(
            list(groups.values()), lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=1e-8,
            fused=device_type in ("cuda", "cpu"))
        return Optimizers([adamw, Muon(muon, lr=cfg.learning_rate)]) if muon else adamw


def hf_class(cfg):
    """Return the name of the class of transformers that has the ingredients of cfg."""
    full, local = "L" * cfg.n_layer, "S" * cfg.n_layer  # patterns of windows
    either, ungated = (False, True), ("gelu", "relu2")
    llama = dict(pos=["rope"], norm=["rmsnorm"], mlp=["swiglu", "geglu"], bias=[False],
                 qk_norm=["none"], window_pattern=[full], embd_rank=[0])
    gpt2 = dict(llama, pos=["learned"], norm=["layernorm"], mlp=ungated, bias=either,
                n_kv_head=[cfg.n_head])
    classes = {  # the values that each class has, in order of preference
        "Llama": dict(llama, bias=either),
        "Arcee": dict(llama, bias=either, mlp=ungated),
        "SmolLM3": dict(llama, bias=either, pos=["none"]),
        "Mistral": dict(llama, window_pattern=[local]),
        "Ministral": dict(llama, window_pattern=[cfg.layer_kinds]),
        "Qwen3": dict(llama, window_pattern=[cfg.layer_kinds], qk_norm=["rmsnorm"]),
        "StableLm": dict(llama, norm=["layernorm"], qk_norm=["none", "layernorm"]),
        "Starcoder2": dict(llama, norm=["layernorm"], mlp=ungated, bias=either,
                           window_pattern=[full, local]),
        "GPT2": gpt2,
        "OPT": dict(gpt2, embd_rank=[cfg.embd_rank], norm_eps=[1e-5])}
    ours = {**vars(cfg), "window_pattern": cfg.layer_kinds}
    lacks = {name: [f"--{option}={ours[option]}" for option, values in has.items()
                    if ours[option] not in values] for name, has in classes.items()}
    closest = min(lacks, key=lambda name: len(lacks[name]))
    if lacks[closest]:
        fail("no class of transformers known here has all these ingredients, so there is no "
             f"export: the closest, {closest}, lacks {' '.join(lacks[closest])}")
    return closest


def to_hf(model):
    """Return the same weights in a class of transformers, which depends on the options. Shared
    weights are repeated, and products of low rank multiplied out."""
    import transformers
    cfg = model.cfg
    name = hf_class(cfg)
    shape = dict(
        vocab_size=cfg.vocab_size, max_position_embeddings=cfg.block_size, hidden_size=cfg.n_embd,
        num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head, tie_word_embeddings=cfg.tie,
        bos_token_id=None, eos_token_id=None, pad_token_id=None)
    # two names of GELU by tanh: the second is the one of GPT-2's time
    activation = {"swiglu": "silu", "relu2": "relu2"}.get(cfg.mlp, "gelu_pytorch_tanh")
    old_activation = "gelu_new" if cfg.mlp == "gelu" else activation
    rotary = dict(
        shape, intermediate_size=cfg.ffn_dim, num_key_value_heads=cfg.n_kv_head,
        hidden_act=activation,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta,
                         "partial_rotary_factor": 1.0})  # StableLm's default is a quarter
    llama = dict(rotary, rms_norm_eps=cfg.norm_eps, head_dim=cfg.head_dim)
    biases = dict(attention_bias=cfg.bias, mlp_bias=cfg.bias)
    kinds = {"S": "sliding_attention", "L": "full_attention"}
    windows = dict(sliding_window=cfg.window, layer_types=[kinds[kind] for kind in cfg.layer_kinds])
    settings = {
        "Llama": dict(llama, **biases),
        "Arcee": dict(llama, **biases),
        "SmolLM3": dict(llama, **biases, no_rope_layers=[0] * cfg.n_layer),
        "Mistral": dict(llama, sliding_window=cfg.window),
        "Ministral": dict(llama, **windows),
        "Qwen3": dict(llama, **windows, use_sliding_window="S" in cfg.layer_kinds),
        "StableLm": dict(rotary, layer_norm_eps=cfg.norm_eps, use_qkv_bias=False,
                         qk_layernorm=cfg.qk_norm == "layernorm"),
        "Starcoder2": dict(
            rotary, norm_epsilon=cfg.norm_eps, use_bias=cfg.bias, residual_dropout=0.0,
            embedding_dropout=0.0, sliding_window=cfg.window if "S" in cfg.layer_kinds else None),
        "GPT2": dict(
            shape, n_inner=cfg.ffn_dim, layer_norm_epsilon=cfg.norm_eps,
            activation_function=old_activation, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            n_ctx=cfg.block_size),  # llama.cpp reads n_ctx
        "OPT": dict(shape, ffn_dim=cfg.ffn_dim, word_embed_proj_dim=cfg.embd_rank,
                    activation_function=old_activation, dropout=0.0, layerdrop=0.0),
    }[name]
    config = getattr(transformers, f"{name}Config")(**settings)
    if cfg.pos == "rope":  # where transformers 4, vLLM and llama.cpp look for it
        config.rope_theta, config.partial_rotary_factor = cfg.rope_theta, 1.0
    hf = transformers.AutoModelForCausalLM.from_config(config)
    # some classes have biases that we lack
    biases = {key: torch.zeros_like(p) for key, p in hf.state_dict().items() if "bias" in key}
    hf.load_state_dict({**biases, **hf_weights(cfg, name, model.state_dict())})
    return hf


def hf_weights(cfg, name, weights):
    """Return weights of our model under the names and in the form of a class of transformers."""
    weights = dict(weights)
    for key in [key for key in weights if key.endswith(".0.weight")]:  # a product of low rank
        base = key.removesuffix("0.weight")
        weights[f"{base}weight"] = weights.pop(f"{base}1.weight") @ weights.pop(key)
        if cfg.bias:
            weights[f"{base}bias"] = weights.pop(f"{base}1.bias")
    if name == "OPT":  # its first two rows of positions are never used
        positions = weights["model.embed_positions.weight"]
        weights["model.embed_positions.weight"] = F.pad(positions, (0, 0, 2, 0))
    for i in range(cfg.n_layer):
        attn = f"model.layers.{i}.self_attn."
        if name == "GPT2":  # it has q, k and v in one matrix
            for kind in ("weight", "bias") if cfg.bias else ("weight",):
                weights[f"{attn}c_attn.{kind}"] = torch.cat(
                    [weights.pop(f"{attn}{x}_proj.{kind}") for x in "qkv"])
        if name == "StableLm" and cfg.qk_norm != "none":  # it has a weight for each head
            for x, heads in ("q", cfg.n_head), ("k", cfg.n_kv_head):
                weight = weights.pop(f"{attn}{x}_norm.weight")
                for head in range(heads):
                    weights[f"{attn}{x}_layernorm.norms.{head}.weight"] = weight
    names = {
        "Starcoder2": {"up_proj": "c_fc", "down_proj": "c_proj"},
        "OPT": {"model.norm": "model.final_layer_norm", "model.": "model.decoder.",
                "o_proj": "out_proj", "input_layernorm": "self_attn_layer_norm",
                "post_attention_layernorm": "final_layer_norm", "mlp.up_proj": "fc1",
                "mlp.down_proj": "fc2"},
        "GPT2": {"model.layers": "transformer.h", "model.embed_tokens": "transformer.wte",
                 "model.embed_positions": "transformer.wpe", "model.norm": "transformer.ln_f",
                 "self_attn": "attn", "o_proj": "c_proj", "input_layernorm": "ln_1",
                 "post_attention_layernorm": "ln_2", "up_proj": "c_fc", "down_proj": "c_proj"},
    }.get(name, {})
    renamed = {}
    for key, value in weights.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        # GPT-2's linear layers hold their transposed matrices
        renamed[key] = value.t() if name == "GPT2" and ".c_" in key else value
    return renamed


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
