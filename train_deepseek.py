"""
DeepSeek-V3 (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", arXiv 2412.19437). It differs from
LLaMA 3 in these points:
- Multi-head latent attention: queries are computed from a narrow latent, and keys and values from
  another. Only qk_rope_head_dim dimensions of a query or key are rotated by position, and this part
  of the key is the same for all heads (section 2.1.1).
- Mixture of experts: for each token a sigmoid router chooses 2 of 8 small MLPs, and one more, the
  shared expert, serves all tokens (section 2.1.2). The first layer has a dense MLP instead, as have
  the first three of V3's 61 layers (section 4.2).
- Load balancing: a bias per expert, adjusted after each step, affects which experts are chosen but
  not their weights. A weak balance loss for each sequence is added (section 2.1.2).
- Multi-token prediction: in training, one more block predicts the token after the next (section
  2.2).
- All weights start with a standard deviation of 0.006 (section 4.2).
Experts can be limited to the best groups, as V3 does to save traffic between nodes; the default is
one group. V3 has a separate output head; here the head is the embedding. Of 122,999,040 parameters
a token uses 84,070,656; the block that only serves training has 8,212,864 more.

What to expect: multi-token prediction costs 269 M of the 887 M FLOPs per token, in training only:
logged losses, HellaSwag, samples and exports leave it out, and --mtp=false turns it off. The
standard deviation of 0.006 was chosen for a width of 7,168 and learns slowly in small models and
short runs: those of the README end at a validation loss of 5.38 with --init_std=0.02, and at 5.52
with 0.006. So also run --init_std=0.02 before you rank it. The log's maxvio is the load of the
busiest expert in the worst layer, divided by the mean load, minus 1: 0 is ideal, 3 the worst. The
bias needs hundreds of steps: with 0.02 maxvio averages 2.8, 1.7, 0.9 and 0.8 in the first, fourth,
seventh and last tenth of those 612 steps (three seeds).

Run it:
  python train_deepseek.py --tiny                # a small model on built-in text, minutes on a CPU
  python train_deepseek.py                       # one GPU, after python fineweb.py
  torchrun --nproc_per_node=8 train_deepseek.py  # eight GPUs: the same result, sooner
  torchrun --nproc_per_node=8 train_deepseek.py --resume=auto
  python train_deepseek.py --sample="Hello, I'm a language model,"
and on each of two nodes, where HOST is the address of one of them:
  torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST train_deepseek.py
"""
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from common import (RunConfig, ShardLoader, accumulation_steps, configure_compiler, cosine_lr,
                    init_world, parse_args, row_losses)
from fineweb import get_tokenizer, one_line_errors, vocab_of
from hellaswag import load_hellaswag
from muon import Muon, Optimizers
from run import Run, check_memory, use_checkpoint

ARCH = "deepseek"


@dataclass
class Config(RunConfig):
    # model
    block_size: int = 1024  # context length in tokens
    vocab_size: int = 50304  # size of the embedding; by default the tokens of data_dir and padding
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # number of attention heads
    n_embd: int = 768  # width of the residual stream
    q_lora_rank: int = 384  # width of the latent of queries
    kv_lora_rank: int = 256  # width of the latent of keys and values; 4 x v_head_dim, as in V3
    # flash attention wants one width for queries, keys and values, so nope + rope = v
    qk_nope_head_dim: int = 40  # dimensions of a query or key without position; V3: 128
    qk_rope_head_dim: int = 24  # dimensions of a query or key with rotary position; V3: 64
    v_head_dim: int = 64  # dimensions of a value; V3: 128
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    init_std: float = 0.006  # standard deviation of all initial weights
    n_dense_layer: int = 1  # number of first blocks with a dense MLP instead of experts; V3: 3
    ffn_dim: int = 2304  # hidden width of the dense MLP; 9 x moe_ffn_dim, as in V3
    moe_ffn_dim: int = 256  # hidden width of an expert
    n_routed_experts: int = 8  # number of experts to choose from
    n_activated_experts: int = 2  # number of these that a token uses
    n_shared_experts: int = 1  # number of experts that every token uses
    n_group: int = 1  # number of groups of experts; V3: 8, one per node
    topk_group: int = 1  # number of best groups to which a token's choice is limited; V3: 4
    route_scale: float = 1.41  # factor of the sum of routed experts, about sqrt(2); V3: 2.5
    mtp: bool = True  # train with multi-token prediction
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
    bias_update_speed: float = 0.001  # gamma, change of a bias per step; 0 in the last 3%
    balance_loss_alpha: float = 0.0001  # weight of the sequence-wise balance loss
    mtp_loss_weight: float = 0.3  # weight of the multi-token loss; a third of it in the last 32%
    # run: see RunConfig in common.py
    log_dir: str = f"log/{ARCH}"
    training_options = RunConfig.training_options | {
        "bias_update_speed", "balance_loss_alpha", "mtp_loss_weight"}
    limits = {**RunConfig.limits, "n_dense_layer": (0, 2**40)}

    def __post_init__(self):
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"--qk_rope_head_dim={self.qk_rope_head_dim} must be even: positions "
                             "rotate pairs")
        if self.n_embd % 8 or self.moe_ffn_dim % 8:
            raise ValueError(f"--n_embd={self.n_embd} and --moe_ffn_dim={self.moe_ffn_dim} must be "
                             "multiples of 8")
        if self.n_dense_layer >= self.n_layer:
            raise ValueError(f"--n_dense_layer={self.n_dense_layer} must be less than "
                             f"--n_layer={self.n_layer}, or no layer has experts")
        if self.n_routed_experts % self.n_group or self.n_routed_experts < 2 * self.n_group:
            raise ValueError(f"--n_routed_experts={self.n_routed_experts} do not make "
                             f"--n_group={self.n_group} equal groups of at least two")
        choice = self.topk_group * self.n_routed_experts // self.n_group
        if self.topk_group > self.n_group or self.n_activated_experts > choice:
            raise ValueError(f"--n_activated_experts={self.n_activated_experts} of the {choice} "
                             f"experts in --topk_group={self.topk_group} of "
                             f"--n_group={self.n_group} groups cannot be chosen: lower it")
        if self.mtp and self.block_size < 2:
            raise ValueError(f"--block_size={self.block_size} has no token after the next: use "
                             "--mtp=false")


TINY = dict(block_size=64, n_layer=4, n_head=4, n_embd=128, q_lora_rank=64,
            kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32, ffn_dim=384,
            moe_ffn_dim=64, init_std=0.02, log_dir=f"log/{ARCH}-tiny")


class RMSNorm(nn.Module):
    """Computes x / rms(x) in fp32, rounds it to the type of x, and multiplies it by the weight (as
    DeepseekV3RMSNorm in transformers)."""

    def __init__(self, dim, eps=1e-6):
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
    """Rotate each pair of neighbours (x_2i, x_2i+1) by its angle: x (B, T, H, D),
    rope (2, T, D/2)."""
    cos, sin = rope[:, :, None]  # (T, 1, D/2): the same for all heads
    a, b = x.float()[..., ::2], x.float()[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).type_as(x)


class Attention(nn.Module):
    """Multi-head latent attention, equations 1 to 11. The latents pay off only with a cache of keys
    and values, which training does not have."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.kv_rank = cfg.kv_lora_rank
        self.nope_dim = cfg.qk_nope_head_dim
        self.rope_dim = cfg.qk_rope_head_dim
        self.v_dim = cfg.v_head_dim
        self.q_a_proj = nn.Linear(cfg.n_embd, cfg.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(cfg.q_lora_rank)
        q_dim = cfg.n_head * (self.nope_dim + self.rope_dim)
        self.q_b_proj = nn.Linear(cfg.q_lora_rank, q_dim, bias=False)
        latent_dim = self.kv_rank + self.rope_dim
        self.kv_a_proj_with_mqa = nn.Linear(cfg.n_embd, latent_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(cfg.kv_lora_rank)
        kv_dim = cfg.n_head * (self.nope_dim + self.v_dim)
        self.kv_b_proj = nn.Linear(cfg.kv_lora_rank, kv_dim, bias=False)
        self.o_proj = nn.Linear(cfg.n_head * self.v_dim, cfg.n_embd, bias=False)

    def forward(self, x, rope):
        B, T, _ = x.shape
        # (6) to (9): queries
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(B, T, self.n_head, -1)
        q_nope, q_rope = q.split([self.nope_dim, self.rope_dim], dim=-1)  # (B, T, n_head, D)
        q = torch.cat([q_nope, rotate(q_rope, rope)], dim=-1)
        # (1) to (5): keys and values; one rotated key for all heads
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.kv_rank, self.rope_dim], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(B, T, self.n_head, -1)
        k_nope, v = kv.split([self.nope_dim, self.v_dim], dim=-1)
        k_rope = rotate(k_rope[:, :, None], rope).expand(-1, -1, self.n_head, -1)
        k = torch.cat([k_nope, k_rope], dim=-1)
        # transposed only here, so that y has the memory order of x and o_proj needs no copy
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, cfg, dim):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.n_embd, dim, bias=False)
        self.up_proj = nn.Linear(cfg.n_embd, dim, bias=False)
        self.down_proj = nn.Linear(dim, cfg.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def topk(x, k):
    """Return values and indices of the k largest in the last dimension, of equals the first
    ones. On CUDA torch.compile fuses a short sort with its neighbours, but not torch.topk."""
    values, indices = x.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k]


class Gate(nn.Module):
    """The router: it selects the experts of each token and their weights (equations 13 to 20)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.empty(cfg.n_routed_experts, cfg.n_embd))
        self.register_buffer("e_score_correction_bias", torch.zeros(cfg.n_routed_experts))
        # tokens that each expert got since the last update
        self.register_buffer("load", torch.zeros(cfg.n_routed_experts), persistent=False)

    def forward(self, x):
        """Return experts int64 (B, T, K), their weights (B, T, K) and the balance loss: x (B, T,
        C)."""
        cfg = self.cfg
        # (15): affinities, in fp32 because bf16 would make close ones equal
        with torch.autocast(x.device.type, enabled=False):
            score = F.linear(x.float(), self.weight).sigmoid()  # (B, T, n_routed_experts)
        with torch.no_grad():
            # the bias takes part in the choice alone (16)
            choice = (score + self.e_score_correction_bias).unflatten(-1, (cfg.n_group, -1))
            # node-limited routing (section 2.1.2): a group's score is the sum of its best two
            best_two, _ = topk(choice, 2)
            _, groups = topk(best_two.sum(-1), cfg.topk_group)
            outside = torch.ones_like(choice[..., 0], dtype=torch.bool).scatter(-1, groups, False)
            choice = choice.masked_fill(outside[..., None], -torch.inf)
            # the best experts in these groups
            _, expert = topk(choice.flatten(-2), cfg.n_activated_experts)
            if self.training:
                # two sums, as a single one keeps few of a GPU's cores busy
                self.load += self.one_hot(expert).sum(1).sum(0)
        # (13), (14): weights from the scores without the bias; route_scale as in V3's code
        weight = score.gather(-1, expert)
        weight = cfg.route_scale * weight / (weight.sum(-1, keepdim=True) + 1e-20)
        return expert, weight, self.balance_loss(score) if self.training else 0.0

    def one_hot(self, expert):
        """Return 1.0 at the chosen experts: int64 (B, T, K) -> (B, T, n_routed_experts)."""
        every = torch.arange(self.cfg.n_routed_experts, device=expert.device)
        return (expert[..., None] == every).sum(-2).float()

    def balance_loss(self, score):
        """Return the loss of equations 17 to 20, the mean over the sequences. It counts the
        experts that would be chosen without bias and groups."""
        cfg = self.cfg
        _, expert = topk(score.detach(), cfg.n_activated_experts)
        # (18): f, 1.0 for an even load, (B, n_routed_experts)
        frequency = self.one_hot(expert).mean(1) * cfg.n_routed_experts / cfg.n_activated_experts
        # (19), (20): P, (B, n_routed_experts)
        probability = (score / score.sum(-1, keepdim=True)).mean(1)
        return cfg.balance_loss_alpha * (frequency * probability).sum(-1).mean()  # (17)


class Permute(torch.autograd.Function):
    """Returns x[order]. The permutation `inverse` undoes `order`, so that the gradient is a gather,
    too, and not a sum with atomic additions."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx, gradient):
        inverse, = ctx.saved_tensors
        return gradient[inverse], None, None


class Experts(nn.Module):
    """The routed experts. No token is dropped, and no shape depends on the choice.

    F.grouped_mm is one kernel in bf16 on an H100 (sm90), and the host never waits for the
    device. On an A100 it becomes a product per expert, and the host waits to know their sizes;
    the result is the same. On a B200 (sm100) PyTorch has an open report of wrong gradients for
    experts without tokens (its issue 172439). torch.compile supports it only in bf16; otherwise
    `compute_all_experts` replaces it."""

    def __init__(self, cfg):
        super().__init__()
        n, C, hidden = cfg.n_routed_experts, cfg.n_embd, cfg.moe_ffn_dim
        self.gate_up_proj = nn.Parameter(torch.empty(n, 2 * hidden, C))
        self.down_proj = nn.Parameter(torch.empty(n, C, hidden))

    def forward(self, x, expert, weight):
        """Return the weighted sum of the experts: x (N, C), expert int64 (N, K), weight (N, K) ->
        (N, C)."""
        # autocast does not know grouped_mm
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        x, gate_up_proj, down_proj = (y.to(dtype) for y in (x, self.gate_up_proj, self.down_proj))
        if torch.compiler.is_compiling() and dtype != torch.bfloat16:
            return self.compute_all_experts(x, expert, weight)
        # sort all N * K (token, expert) pairs by expert; ends[e] is the end of expert e's pairs
        N, K = expert.shape
        short = expert.flatten().to(torch.int16)  # a GPU sorts bit by bit: 16 are enough, not 64
        sorted_expert, order = short.sort(stable=True)
        inverse = torch.empty_like(order).scatter(0, order, torch.arange(N * K, device=x.device))
        experts = torch.arange(len(down_proj), dtype=torch.int16, device=x.device)
        ends = torch.searchsorted(sorted_expert, experts, right=True, out_int32=True)
        rows = Permute.apply(x.repeat_interleave(K, dim=0), order, inverse)
        # each expert's MLP on its rows
        gate, up = F.grouped_mm(rows, gate_up_proj.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        rows = F.grouped_mm(F.silu(gate) * up, down_proj.transpose(1, 2), offs=ends)
        # back to the order of the tokens
        y = Permute.apply(rows, inverse, order).view(N, K, -1)
        return (y * weight[..., None]).sum(1).to(dtype)

    def compute_all_experts(self, x, expert, weight):
        """Return the same for every token from every expert: the routed sum of equation 12."""
        weight = weight.new_zeros(len(x), len(self.down_proj)).scatter(1, expert, weight)
        gate, up = torch.einsum("nc,ehc->neh", x, self.gate_up_proj).chunk(2, dim=-1)
        return torch.einsum("neh,ech,ne->nc", F.silu(gate) * up, self.down_proj, weight)


class MoE(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate = Gate(cfg)
        self.experts = Experts(cfg)
        self.shared_experts = MLP(cfg, cfg.n_shared_experts * cfg.moe_ffn_dim)

    def forward(self, x):
        expert, weight, balance_loss = self.gate(x)
        y = self.experts(x.flatten(0, 1), expert.flatten(0, 1), weight.flatten(0, 1)).view_as(x)
        return y + self.shared_experts(x), balance_loss


class Block(nn.Module):
    def __init__(self, cfg, dense):
        super().__init__()
        self.dense = dense
        self.input_layernorm = RMSNorm(cfg.n_embd)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.n_embd)
        self.mlp = MLP(cfg, cfg.ffn_dim) if dense else MoE(cfg)

    def forward(self, x, rope):
        """Return x (B, T, C) and the balance loss."""
        x = x + self.self_attn(self.input_layernorm(x), rope)
        y = self.post_attention_layernorm(x)
        if self.dense:
            return x + self.mlp(y), 0.0
        y, balance_loss = self.mlp(y)
        return x + y, balance_loss


class MTP(nn.Module):
    """Multi-token prediction of depth 1, equations 21 to 23: from the model's output at token t
    and the embedding of token t + 1 it computes what the shared head turns into logits of token
    t + 2. The published weights take [embedding; hidden], with hidden behind the final norm; the
    paper's equation has the other order."""

    def __init__(self, cfg):
        super().__init__()
        self.enorm = RMSNorm(cfg.n_embd)
        self.hnorm = RMSNorm(cfg.n_embd)
        self.eh_proj = nn.Linear(2 * cfg.n_embd, cfg.n_embd, bias=False)
        self.mtp_block = Block(cfg, dense=False)
        self.post_norm = RMSNorm(cfg.n_embd)

    def forward(self, hidden, embedding, rope):
        x = self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(hidden)], dim=-1))
        x, balance_loss = self.mtp_block(x, rope)
        return self.post_norm(x), balance_loss


class Model(nn.Module):
    """Parameters carry the names of Hugging Face's DeepSeek-V3, which has no mtp."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(cfg.vocab_size, cfg.n_embd),
            layers=nn.ModuleList(Block(cfg, i < cfg.n_dense_layer) for i in range(cfg.n_layer)),
            norm=RMSNorm(cfg.n_embd)))
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight
        self.mtp = MTP(cfg) if cfg.mtp else None
        rope = rope_table(cfg.block_size, cfg.qk_rope_head_dim, cfg.rope_theta)
        self.register_buffer("rope", rope, persistent=False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # updates made
        self.register_buffer("maxvio", torch.zeros(()), persistent=False)
        for p in self.parameters():
            if p.dim() >= 2:
                nn.init.normal_(p, std=cfg.init_std)

    def embed(self, idx):
        """Return the embedding: idx int64 (B, T) -> (B, T, C)."""
        x = self.model.embed_tokens(idx)
        if torch.is_autocast_enabled(idx.device.type):
            # a bf16 residual stream halves the memory traffic between matrix products
            x = x.to(torch.get_autocast_dtype(idx.device.type))
        return x

    def decode(self, idx):
        """Return what lm_head turns into logits, and the sum of the layers' balance losses: idx
        int64 (B, T) -> (B, T, C) and a scalar."""
        x = self.embed(idx)
        rope = self.rope[:, :idx.size(1)]
        balance_loss = 0.0
        for block in self.model.layers:
            x, loss = block(x, rope)
            balance_loss = balance_loss + loss
        return self.model.norm(x), balance_loss

    def hidden(self, idx):
        """Return what lm_head turns into logits: idx int64 (B, T) -> (B, T, C)."""
        hidden, _ = self.decode(idx)
        return hidden

    def forward(self, idx, targets=None):
        """Return (logits, None), or (None, loss) if there are targets.

        idx and targets: int64 (B, T), where a target of -1 does not count. logits: float32 (B,
        T, vocab_size). loss: the mean cross-entropy of the next token, a scalar; in training its
        gradient also contains that of the balance loss and of multi-token prediction."""
        hidden, extra_loss = self.decode(idx)
        if targets is None:
            return self.lm_head(hidden).float(), None
        loss = self.loss(hidden, targets)
        if not self.training:
            return None, loss
        if self.mtp is not None:
            # the last position's next token is only in the targets
            next_idx = torch.cat([idx[:, 1:], targets[:, -1:].clamp(min=0)], dim=1)
            ahead, balance_loss = self.mtp(hidden, self.embed(next_idx), self.rope[:, :idx.size(1)])
            # the weight falls to a third after 10T of 14.8T tokens (section 4.2)
            early = self.updates < 10 / 14.8 * self.cfg.max_steps
            weight = torch.where(early, self.cfg.mtp_loss_weight, self.cfg.mtp_loss_weight / 3)
            # the last position has no token after the next one
            mtp_loss = self.loss(ahead, F.pad(targets[:, 1:], (0, 1), value=-1))
            extra_loss = extra_loss + balance_loss + weight * mtp_loss
        return None, loss + (extra_loss - extra_loss.detach())  # adds only to the gradient

    def loss(self, hidden, targets):
        logits = self.lm_head(hidden).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def compile(self, **options):
        """Compile each block and the loss separately. Blocks of a kind share a graph, so that this
        takes seconds; DDP sums a block's gradients while those of the block before are computed."""
        parts = [*self.model.layers, self.model.norm]
        for module in parts if self.mtp is None else [*parts, self.mtp]:
            module.compile(**options)
        self.loss = torch.compile(self.loss, **options)

    @torch.no_grad()
    def update_bias(self, *_):
        """Raise the biases of experts that got fewer tokens than the mean of the step, and lower
        the others, by gamma. This is called after each update (section 2.1.2; Wang et al. 2024,
        arXiv 2408.15664, algorithm 1)."""
        gates = [module for module in self.modules() if isinstance(module, Gate)]
        load = torch.stack([gate.load for gate in gates])  # (layers, n_routed_experts)
        if dist.is_initialized():
            dist.all_reduce(load)
        mean = load.mean(1, keepdim=True)
        # gamma is 0 after 14.3T of 14.8T tokens (section 4.2)
        late = self.updates >= 14.3 / 14.8 * self.cfg.max_steps
        gamma = torch.where(late, 0.0, self.cfg.bias_update_speed)
        for gate, direction in zip(gates, (mean - load).sign()):
            gate.e_score_correction_bias += gamma * direction
            gate.load.zero_()
        self.maxvio.copy_((load.amax(1) / mean[:, 0] - 1).max())
        self.updates += 1

    def extra_logs(self):
        """Return maxvio of the last update: an expert's highest load / the mean load, minus 1. This
        is called after each step and clears the loads, which a step that float16 skips leaves."""
        for module in self.modules():
            if isinstance(module, Gate):
                module.load.zero_()
        return {"maxvio": self.maxvio}

    def num_params(self):
        """Return the numbers of parameters. As in the paper, `total` excludes the block for
        multi-token prediction, which is `mtp`; `active` are those that a token uses."""
        mtp = sum(p.numel() for p in self.mtp.parameters()) if self.mtp is not None else 0
        total = sum(p.numel() for p in self.parameters()) - mtp
        idle = (self.cfg.n_layer - self.cfg.n_dense_layer) * self.idle_per_layer()
        embedding = self.lm_head.weight.numel()
        return {"total": total, "active": total - idle, "non_embedding": total - embedding,
                "mtp": mtp}

    def idle_per_layer(self):
        """Return the number of parameters of a layer's experts that a token does not use."""
        cfg = self.cfg
        return (cfg.n_routed_experts - cfg.n_activated_experts) * 3 * cfg.n_embd * cfg.moe_ffn_dim

    def flops_per_token(self):
        """Return the FLOPs of forward and backward pass: 6 N, and 6 (d_qk + d_v) T per layer. N
        counts the parameters in a token's matrix products; multi-token prediction adds those of
        its block and uses the head a second time."""
        cfg, params = self.cfg, self.num_params()
        n, layers = params["active"], cfg.n_layer
        if cfg.mtp:
            n += params["mtp"] - self.idle_per_layer() + self.lm_head.weight.numel()
            layers += 1
        width = cfg.n_head * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim)
        return 6 * n + 6 * layers * width * cfg.block_size

    def configure_optimizers(self, cfg, device_type):
        """Return a fused AdamW, with weight decay for matrices and the embedding but not for
        norms; each of its steps ends with update_bias. With --optimizer=muon Muon updates the
        matrices inside the blocks instead, except the routers, and those of each expert alone."""
        matrices = {"weight_decay": cfg.weight_decay, "lr_scale": cfg.matrix_lr}
        linear = {**matrices, "params": []}
        routers = {**matrices, "params": []}
        gate_up = {**matrices, "params": [], "rows": [cfg.moe_ffn_dim, cfg.moe_ffn_dim]}
        for module in self.modules():
            if isinstance(module, nn.Linear) and module is not self.lm_head:
                linear["params"].append(module.weight)
            elif isinstance(module, Gate):
                routers["params"].append(module.weight)
            elif isinstance(module, Experts):
                gate_up["params"].append(module.gate_up_proj)
                linear["params"].append(module.down_proj)
        embd = {"params": [self.model.embed_tokens.weight],
                "weight_decay": cfg.weight_decay, "lr_scale": cfg.embd_lr}
        vectors = {"params": [p for p in self.parameters() if p.dim() < 2],
                   "weight_decay": 0.0, "lr_scale": cfg.vector_lr}
        muon = cfg.optimizer == "muon"
        adamw = torch.optim.AdamW(
            [embd, routers, vectors] if muon else [embd, routers, linear, gate_up, vectors],
            lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=1e-8,
            fused=device_type in ("cuda", "cpu"))
        adamw.register_step_post_hook(self.update_bias)
        return Optimizers([adamw, Muon([linear, gate_up], lr=cfg.learning_rate)]) if muon else adamw


def to_hf(model):
    """Return a transformers DeepseekV3ForCausalLM with the same weights, without mtp."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    cfg = model.cfg
    config = DeepseekV3Config(
        vocab_size=cfg.vocab_size, max_position_embeddings=cfg.block_size, hidden_size=cfg.n_embd,
        intermediate_size=cfg.ffn_dim, moe_intermediate_size=cfg.moe_ffn_dim,
        num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head,
        num_key_value_heads=cfg.n_head, n_shared_experts=cfg.n_shared_experts,
        n_routed_experts=cfg.n_routed_experts, num_experts_per_tok=cfg.n_activated_experts,
        n_group=cfg.n_group, topk_group=cfg.topk_group, routed_scaling_factor=cfg.route_scale,
        norm_topk_prob=True, first_k_dense_replace=cfg.n_dense_layer, q_lora_rank=cfg.q_lora_rank,
        kv_lora_rank=cfg.kv_lora_rank, qk_nope_head_dim=cfg.qk_nope_head_dim,
        qk_rope_head_dim=cfg.qk_rope_head_dim, v_head_dim=cfg.v_head_dim, rms_norm_eps=1e-6,
        initializer_range=cfg.init_std, tie_word_embeddings=True, rope_interleave=True,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta}, num_mtp_layers=0,
        bos_token_id=None, eos_token_id=None, pad_token_id=None)
    # where transformers 4, vLLM and llama.cpp look for it; and what only vLLM and SGLang ask for
    config.rope_theta = cfg.rope_theta
    config.topk_method, config.scoring_func, config.moe_layer_freq = "noaux_tc", "sigmoid", 1
    hf = DeepseekV3ForCausalLM(config)
    ours_alone = "mtp.", "updates"
    hf.load_state_dict({name: tensor for name, tensor in model.state_dict().items()
                        if not name.startswith(ours_alone)})
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
