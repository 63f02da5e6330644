"""
Multi-Token Attention, MTA (Golovneva et al. 2025, arXiv 2504.00927, second version): a LLaMA in
which several queries and keys together, not one of each, decide how much attention a token gets.
train_llama.py is changed in these points:
- In every fourth layer the attention scores are convolved: a score becomes a weighted sum over the
  last 6 queries and the 11 keys around its key. So are the attention weights after the softmax.
  Each head has its own kernels: key-query convolution (section 3.1).
- In every layer the heads mix their scores, and after the softmax their weights (section 3.2).
- The output of each head is normalised, and multiplied by a gate of its own (section 3.3).
- theta is 100,000, as in the paper's runs.
It has 123,597,084 parameters. What the paper leaves open follows the authors' code
(facebookresearch/RAM, projects/mta): scores of future keys are zero before the first convolution,
and weights of future keys after the second (equation 5); there is one sigmoid gate for each token
and head, and it reads the normalised output.
Our own choices: LLaMA's 3 key-value heads, where the paper has one for each query head; GPT-2's
initialisation of the matrices; and no weight decay of kernels, mixing matrices, norms and gates,
because it would pull kernels that start as the identity to zero.

What to expect: with 880M parameters and 105B tokens the authors report a validation loss 0.03 below
that of a plain Transformer, at a tenth of its speed; 0.02 of it come from mixing heads (tables 2, 5
and 9). Computed as here, MTA is about twice as fast as their code on a CPU.
In the small runs of the README the initialisation weighs as much as the architecture: MTA ends at
5.80, with its authors' initialisation (--init_std=0) at 5.62, and LLaMA at 5.45.

Run it:
  python train_mta.py --tiny                # a small model on built-in text, minutes on a CPU
  python train_mta.py                       # one GPU, after python fineweb.py
  torchrun --nproc_per_node=8 train_mta.py  # eight GPUs: the same result, sooner
  torchrun --nproc_per_node=8 train_mta.py --resume=auto
  python train_mta.py --sample="Hello, I'm a language model,"
and on each of two nodes, where HOST is the address of one of them:
  torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST train_mta.py
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from common import (RunConfig, ShardLoader, accumulation_steps, configure_compiler, cosine_lr,
                    init_world, parse_args, row_losses)
from fineweb import get_tokenizer, one_line_errors, vocab_of
from hellaswag import load_hellaswag
from muon import Muon, Optimizers
from run import Run, check_memory, use_checkpoint

ARCH = "mta"


@dataclass
class Config(RunConfig):
    # model
    block_size: int = 1024  # context length in tokens
    vocab_size: int = 50304  # size of the embedding; by default the tokens of data_dir and padding
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # number of query heads
    n_kv_head: int = 3  # number of key-value heads; 4 query heads share one
    n_embd: int = 768  # width of the residual stream
    ffn_dim: int = 2432  # hidden width of the MLP
    rope_theta: float = 100000.0  # base of the rotary wavelengths
    norm_eps: float = 1e-5  # epsilon of RMSNorm
    init_std: float = 0.02  # standard deviation of initial weights; 0: 1 / sqrt(inputs)
    kq_period: int = 4  # every Nth layer has key-query convolutions: 2, 6, 10 of 0 to 11
    query_kernel: int = 6  # queries that a kernel covers: the last ones
    key_kernel: int = 11  # keys that a kernel covers, an odd number: as many on both sides
    # training
    total_batch_size: int = 524288  # tokens per step
    batch_size: int = 32  # sequences per device and micro-batch; lower it if memory runs out
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
        if self.key_kernel % 2 == 0:
            raise ValueError(f"--key_kernel={self.key_kernel} must be odd: a kernel reaches "
                             "equally far to both sides of a key")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head


TINY = dict(block_size=64, n_layer=4, n_head=4, n_kv_head=2, n_embd=128,
            ffn_dim=384, log_dir=f"log/{ARCH}-tiny")


class RMSNorm(nn.Module):
    """Computes x / rms(x) in fp32, rounds it to the type of x, and multiplies it by the weight (as
    Meta's llama3/llama/model.py)."""

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

    Meta's code pairs neighbours instead, which is the same with permuted rows of q_proj and k_proj;
    this is the order of Hugging Face's weights."""
    cos, sin = rope[:, :, None]  # (T, 1, D/2): the same for all heads
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


def head_mixing_attention(q, k, v, mixing_before, mixing_after):
    """Attention whose heads mix their scores and, after the softmax, their weights (section 3.2).

    q: (B, M, T, D); k, v: (B, G, T, D), where M / G query heads share one; mixing_before and
    mixing_after: (M, M), whose row o has the weights with which head o sums what all heads have.
    Returns (B, M, T, D).

    No score is stored, because a mix of scores is one score of longer vectors: with the keys of all
    groups side by side, sum_h w_h (q_h . k_g(h)) is [sum_h w_h q_h over the heads h of group 1,
    ..., of group G] . [k_1, ..., k_G] (appendix B)."""
    B, M, T, D = q.shape
    G = k.size(1)
    # o: mixed head, g: group, h: head within its group
    queries = torch.einsum("ogh,bghtd->botgd", mixing_before.unflatten(1, (G, -1)),
                           q.unflatten(1, (G, -1))).flatten(3)  # (B, M, T, G D)
    keys = k.transpose(1, 2).reshape(B, 1, T, G * D)  # one head, which all queries share
    values = v.transpose(1, 2).reshape(B, 1, T, G * D)
    # the scale of the paper; that of PyTorch would follow the longer vectors
    y = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=D ** -0.5,
                                       enable_gqa=True)
    return mix_own_group(y, mixing_after, G)


def mix_own_group(y, mixing, G):
    """Each head has read the values of all groups, y (B, M, T, G D). Mix the heads, and keep from
    each result the values of its own group: (B, M, T, D)."""
    y = y.unflatten(3, (G, -1))
    return torch.einsum("goh,bhtgd->bgotd", mixing.unflatten(0, (G, -1)), y).flatten(1, 2)


def read_at(x, offset):
    """Return y with y[t] = x[t + offset] for x (..., T), and zero outside the text."""
    T = x.size(-1)
    offset = max(-T, min(offset, T))
    return F.pad(x, (-offset, offset))


def neighbours(x, offsets, dim):
    """Return x (..., T) at t + offset for each of the offsets, stacked in a new dimension."""
    return torch.stack([read_at(x, offset) for offset in offsets], dim)


def diagonals(x, n):
    """Return y (..., n, T) with y[d, i] = x[i, i - d] for x (..., T, T), and zero where i < d."""
    T = x.size(-1)
    # rows of T + n - 1 numbers, read as rows of T + n: each starts one column further on, so that
    # x[i, i] is in the same column of all rows, and x[i, i - d] d columns to the left of it
    x = F.pad(F.pad(x, (n - 1, 0)).flatten(-2), (0, T))
    return x.unflatten(-1, (T, T + n))[..., :n].flip(-1).mT


def from_diagonals(y):
    """Return x (..., T, T) with x[i, i - d] = y[d, i] for y (..., n, T), and zero on all other
    diagonals."""
    n, T = y.shape[-2:]
    x = F.pad(y.mT.flip(-1), (0, T)).flatten(-2)[..., :T * (T + n - 1)]
    return x.unflatten(-1, (T, T + n - 1))[..., n - 1:]


def key_query_attention(q, k, v, mixing_before, mixing_after, kernel_before, kernel_after):
    """Attention with key-query convolutions of scores and of weights (equations 3 to 7):

        scores = mixing_before (kernel_before * [q k^T / sqrt(D)])
        y = mixing_after [kernel_after * softmax(scores, with -inf for future keys)] v

    where [] sets future keys to zero, and * is a sum over the last query_kernel queries and the
    key_kernel keys around a key. kernel_before, kernel_after: (M, query_kernel, key_kernel), one
    for each head; the other shapes are those of head_mixing_attention.

    A convolution of T x T numbers is slow. But convolved scores are products of neighbouring
    queries with convolved keys, and convolved weights times values are the weights times convolved
    values: except close to the diagonal, where a kernel covers future keys. There are few such
    diagonals, and they are convolved by themselves."""
    B, M, T, D = q.shape
    G = k.size(1)
    _, query_kernel, key_kernel = kernel_before.shape
    before, beside = query_kernel - 1, key_kernel // 2  # how far a kernel reaches
    past = range(-before, 1)  # offsets of the queries under it
    around = range(-beside, beside + 1)  # offsets of the keys
    distance = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)
    q, k = q.mT.contiguous(), k.mT.contiguous()  # time comes last, which saves copies
    v = v.mT.flatten(1, 2)  # (B, G D, T): of all groups

    def convolve_diagonals(x, kernel, n):
        """Return the first n diagonals of a convolved matrix, (B, M, n, T), from those of x."""
        query = torch.arange(-before, 1, device=x.device)[:, None, None, None]
        key = torch.arange(-beside, beside + 1, device=x.device)[:, None, None]
        from_distance = torch.arange(x.size(2), device=x.device)
        to_distance = torch.arange(n, device=x.device)[:, None]
        # a result at distance d sums the inputs at d + query - key, weighted with the kernel
        reached = (from_distance == to_distance + query - key).to(kernel)
        matrix = torch.einsum("hqk,qktf->htqf", kernel, reached).flatten(2)
        return matrix @ neighbours(x, past, 2).flatten(2, 3)

    queries = neighbours(q, past, 2).flatten(2, 3)  # (B, M, query_kernel D, T)
    keys = kernel_before.view(G, -1, key_kernel) @ neighbours(k, around, 2).flatten(3)
    scores = queries.mT @ keys.view(B, M, -1, T)
    # only where a key is less than n positions behind its query can the kernel cover future keys
    n = before + beside + 1
    near_keys = neighbours(k, range(0, -n - beside, -1), 2)
    near_scores = torch.einsum("bghdt,bgndt->bghnt", q.unflatten(1, (G, -1)), near_keys)
    near_scores = convolve_diagonals(near_scores.flatten(1, 2), kernel_before, n)
    scores = torch.where(distance < n, from_diagonals(near_scores), scores) * D ** -0.5

    scores = torch.einsum("oh,bhij->boij", mixing_before, scores)
    weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)

    # the weight of key j + offset moves to key j: it meets the value at j, which is -offset away
    values = kernel_after.view(-1, key_kernel) @ neighbours(v, around[::-1], 1).flatten(2)
    # only where a key is less than n positions behind its query can its weight move to future keys
    n = beside + 1
    parts = values.view(B, M, -1, T) @ weights.masked_fill(distance < n, 0).mT
    parts = parts.unflatten(2, (query_kernel, -1)).unbind(2)  # each (B, M, G D, T)
    # the weights of this query and of those before it
    y = sum(read_at(part, offset) for part, offset in zip(parts, past))
    reach = n + beside + before
    near_weights = convolve_diagonals(diagonals(weights, n), kernel_after, reach)
    y = y + torch.einsum("bhnt,bnct->bhct", near_weights, neighbours(v, range(0, -reach, -1), 1))
    return mix_own_group(y.mT, mixing_after, G)


class Attention(nn.Module):
    def __init__(self, cfg, has_kernels):
        super().__init__()
        self.head_dim, self.has_kernels = cfg.head_dim, has_kernels
        self.q_proj = nn.Linear(cfg.n_embd, cfg.n_head * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.n_embd, cfg.n_kv_head * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.n_embd, cfg.n_kv_head * cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.n_head * cfg.head_dim, cfg.n_embd, bias=False)
        # mixing matrices and kernels start as the identity, so that attention is LLaMA's at first
        self.mixing_before = nn.Parameter(torch.eye(cfg.n_head))
        self.mixing_after = nn.Parameter(torch.eye(cfg.n_head))
        if has_kernels:
            identity = torch.zeros(cfg.n_head, cfg.query_kernel, cfg.key_kernel)
            identity[:, -1, cfg.key_kernel // 2] = 1
            self.kernel_before = nn.Parameter(identity)
            self.kernel_after = nn.Parameter(identity.clone())
        self.norm = RMSNorm(cfg.head_dim, cfg.norm_eps)
        self.gate_weight = nn.Parameter(torch.zeros(cfg.head_dim))
        self.gate_bias = nn.Parameter(torch.zeros(1))

    def forward(self, x, rope):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, n_head, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, n_kv_head, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mixing = self.mixing_before, self.mixing_after
        if self.has_kernels:
            y = key_query_attention(q, k, v, *mixing, self.kernel_before, self.kernel_after)
        else:
            y = head_mixing_attention(q, k, v, *mixing)
        y = self.norm(y.transpose(1, 2))  # each head by itself
        gate = torch.sigmoid((y * self.gate_weight).sum(-1, keepdim=True) + self.gate_bias)
        return self.o_proj((y * gate).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.n_embd, cfg.ffn_dim, bias=False)
        self.up_proj = nn.Linear(cfg.n_embd, cfg.ffn_dim, bias=False)
        self.down_proj = nn.Linear(cfg.ffn_dim, cfg.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        has_kernels = layer % cfg.kq_period == cfg.kq_period // 2  # in the middle of a period
        self.input_layernorm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.self_attn = Attention(cfg, has_kernels)
        self.post_attention_layernorm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, rope):
        x = x + self.self_attn(self.input_layernorm(x), rope)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """Parameters that LLaMA has, too, carry the names of Hugging Face's LLaMA."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(cfg.vocab_size, cfg.n_embd),
            layers=nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer)),
            norm=RMSNorm(cfg.n_embd, cfg.norm_eps)))
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight
        rope = rope_table(cfg.block_size, cfg.head_dim, cfg.rope_theta)
        self.register_buffer("rope", rope, persistent=False)
        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "embed_tokens.weight", "gate_weight")):
                # GPT-2's rule, or the authors', in which residual projections are no smaller
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = cfg.init_std / math.sqrt(2 * cfg.n_layer) if residual else cfg.init_std
                inputs = cfg.ffn_dim if name.endswith("down_proj.weight") else cfg.n_embd
                nn.init.normal_(p, std=std or inputs ** -0.5)

    def hidden(self, idx):
        """Return what lm_head turns into logits: idx int64 (B, T) -> (B, T, C)."""
        x = self.model.embed_tokens(idx)
        if torch.is_autocast_enabled(idx.device.type):
            # a bf16 residual stream halves the memory traffic between matrix products
            x = x.to(torch.get_autocast_dtype(idx.device.type))
        rope = self.rope[:, :idx.size(1)]
        for block in self.model.layers:
            x = block(x, rope)
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

    def compile(self, **options):
        """Compile each block and the loss separately. The blocks share a graph, so that this
        takes seconds; DDP sums a block's gradients while those of the block before are computed."""
        for module in [*self.model.layers, self.model.norm]:
            module.compile(**options)
        self.loss = torch.compile(self.loss, **options)

    def num_params(self):
        total = sum(p.numel() for p in self.parameters())
        embedding = self.lm_head.weight.numel()
        return {"total": total, "active": total, "non_embedding": total - embedding}

    def flops_per_token(self):
        """Return the FLOPs of forward and backward pass: 6 N + 12 L d T (PaLM paper, appendix B),
        for N parameters (the tied embedding counts once, as the head), L layers of width d, and T
        positions, and 6 K T for the K weights of kernels and mixing matrices, each of which meets
        every score."""
        cfg = self.cfg
        mixing = sum(p.numel() for name, p in self.named_parameters()
                     if "kernel" in name or "mixing" in name)
        return (6 * self.num_params()["total"] + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size
                + 6 * mixing * cfg.block_size)

    def configure_optimizers(self, cfg, device_type):
        """Return a fused AdamW, with weight decay for matrices and the embedding but not for norms,
        gates, kernels and the mixing of heads. With --optimizer=muon the matrices inside the blocks
        go to Muon instead."""
        named = dict(self.named_parameters())
        decay = "proj.weight", "embed_tokens.weight"
        embd = {"params": [self.model.embed_tokens.weight],
                "weight_decay": cfg.weight_decay, "lr_scale": cfg.embd_lr}
        matrices = {"params": [p for name, p in named.items() if name.endswith("proj.weight")],
                    "weight_decay": cfg.weight_decay, "lr_scale": cfg.matrix_lr}
        vectors = {"params": [p for name, p in named.items() if not name.endswith(decay)],
                   "weight_decay": 0.0, "lr_scale": cfg.vector_lr}
        muon = cfg.optimizer == "muon"
        adamw = torch.optim.AdamW(
            [embd, vectors] if muon else [embd, matrices, vectors], lr=cfg.learning_rate,
            betas=(cfg.beta1, cfg.beta2), eps=1e-8, fused=device_type in ("cuda", "cpu"))
        return Optimizers([adamw, Muon([matrices], lr=cfg.learning_rate)]) if muon else adamw


def to_hf(model):
    """Return the same weights under the names of the authors' code, as transformers has no such
    class: {name: tensor}."""
    names = {
        "model.": "", "embed_tokens": "tok_embeddings", "lm_head": "output.tied_module",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.norm": "attention.subln", "self_attn": "attention", "mlp": "feed_forward",
        "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo",
        "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3",
        "mixing_before": "wpsm.weight", "mixing_after": "head_kernel",
        "kernel_before": "mta_kernel", "kernel_after": "mta_kernel_after_sm",
        "gate_weight": "gate.weight", "gate_bias": "gate.bias"}
    weights = {}
    for name, w in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # neighbours form a pair there
            w = w.unflatten(0, (-1, 2, model.cfg.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        elif name.endswith("mixing_after"):
            w = w.T[None]
        elif "kernel" in name:
            w = w[:, None]
        elif name.endswith("gate_weight"):
            w = w[None]
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        weights[name] = w
    return weights


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
