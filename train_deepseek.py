"""
DeepSeek-V3 (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", arXiv 2412.19437). It differs from
LLaMA 3 in these points:
- Multi-head latent attention: queries, and keys with values, pass through narrow latents. Only a
  few dimensions carry a rotary position, and there all heads share one key (section 2.1.1).
- Mixture of experts: a sigmoid router chooses 2 of 8 small MLPs for each token, and all tokens use
  one more. The first layer has a normal MLP (section 2.1.2).
- Load balancing: a bias per expert, adjusted after each update, affects which experts are chosen
  but not their weights. A weak loss per sequence helps (section 2.1.2).
- Multi-token prediction: in training, one more block predicts the token after the next (section
  2.2).
- All weights start with a standard deviation of 0.006 (section 4.2).
V3's groups of experts, which save traffic between nodes, are an option. V3's head is a matrix of
its own; here it is the embedding. Of 122,999,040 parameters a token uses 84,070,656; the block that
only serves training has 8,212,864 more.

What to expect: multi-token prediction costs 269 M of the 887 M FLOPs per token, in training only:
logged losses, HellaSwag, samples and exports leave it out, and --mtp=false turns it off. The
standard deviation of 0.006 was chosen for a width of 7,168 and learns slowly in small models and
short runs (--tiny ends at a validation loss of 1.80 with its 0.02, and at 2.60 with 0.006), so also
run --init_std=0.02 before you rank it. The log's maxvio says by how much of its fair share the
busiest expert of the worst layer exceeds it: 0 is ideal, 3 the worst. The bias needs hundreds of
steps: in the README's small run maxvio averages 2.96, 0.96, 0.27 and 0.17 in tenths 1, 4, 7 and 10
of 1,250 steps.

Run it:
  python train_deepseek.py --tiny                # a small model on built-in text, a minute on a CPU
  python train_deepseek.py                       # one GPU, after python fineweb.py
  torchrun --nproc_per_node=8 train_deepseek.py  # eight GPUs: the same result, sooner
  torchrun --nproc_per_node=8 train_deepseek.py --resume=auto
  python train_deepseek.py --sample="Hello, I'm a language model,"
and on each of two nodes, of which HOST is one:
  torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST train_deepseek.py
"""
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from common import (Optimizers, RunConfig, ShardLoader, accumulation_steps, cosine_lr, init_world,
                    parse_args)
from fineweb import get_tokenizer, one_line_errors
from hellaswag import load_hellaswag
from run import Run, use_checkpoint

ARCH = "deepseek"


@dataclass
class Config(RunConfig):
    # model
    block_size: int = 1024  # context length, tokens
    vocab_size: int = 50304  # GPT-2's 50,257 tokens padded to a multiple of 128; below 50257 text is taken as bytes
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # width of the residual stream
    q_lora_rank: int = 384  # width of the latent that queries come from
    kv_lora_rank: int = 256  # of keys and values; 4 heads wide, as in V2 and V3
    # nope + rope = v, since flash attention wants one width for queries, keys and values; V3 has 128 + 64 and 128
    qk_nope_head_dim: int = 40  # dimensions of a query or key without position
    qk_rope_head_dim: int = 24  # and with rotary position
    v_head_dim: int = 64  # dimensions of a value
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    init_std: float = 0.006  # standard deviation of all weights at the start, whatever the width
    n_dense_layer: int = 1  # the first blocks have one MLP instead of experts
    ffn_dim: int = 2304  # hidden width of that MLP; 9 experts wide, as in V3
    moe_ffn_dim: int = 256  # hidden width of an expert
    n_routed_experts: int = 8  # experts to choose from
    n_activated_experts: int = 2  # experts that a token uses of these
    n_shared_experts: int = 1  # and experts that every token uses
    # V3 has 8 groups, one a node, and ranks them by their n_activated_experts / topk_group best experts; here by two
    n_group: int = 1  # groups of experts
    topk_group: int = 1  # groups that a token's experts may come from
    route_scale: float = 1.41  # of the experts' weights: about 1 / their norm at the start; V3 has 2.5 for its 8
    mtp: bool = True  # train with multi-token prediction
    # training
    total_batch_size: int = 524288  # tokens per step
    batch_size: int = 64  # sequences per device and micro-step; lower it if memory runs out
    max_steps: int = 19073  # number of steps; by default 10.0B tokens, an epoch of FineWeb 10BT
    warmup_steps: int = 715  # steps of linear warm-up; by default 375M tokens, as GPT-3
    learning_rate: float = 6e-4  # peak learning rate (GPT-3, table 2.1)
    min_lr_ratio: float = 0.1  # learning rate at the end of the cosine, as a fraction of the peak
    weight_decay: float = 0.1  # weight decay of matrices and embeddings
    beta1: float = 0.9  # AdamW: decay of the mean of gradients
    beta2: float = 0.95  # AdamW: decay of the mean of squared gradients
    grad_clip: float = 1.0  # largest global norm of the gradient
    optimizer: str = "adamw"  # adamw, or muon for the matrices inside the blocks
    bias_update_speed: float = 0.001  # step size of the expert biases (gamma); 0 at the end
    balance_loss_alpha: float = 0.0001  # weight of the sequence-wise balance loss
    mtp_loss_weight: float = 0.3  # weight of multi-token prediction (lambda); later a third of it
    # run: see RunConfig in common.py
    log_dir: str = f"log/{ARCH}"
    training_options = RunConfig.training_options | {
        "bias_update_speed", "balance_loss_alpha", "mtp_loss_weight"}
    limits = {**RunConfig.limits, "n_dense_layer": (0, 2**40)}

    def __post_init__(self):
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"--qk_rope_head_dim={self.qk_rope_head_dim} is odd: positions turn pairs")
        if self.n_embd % 8 or self.moe_ffn_dim % 8:
            raise ValueError(f"--n_embd={self.n_embd} and --moe_ffn_dim={self.moe_ffn_dim} must be multiples of 8")
        if self.n_dense_layer >= self.n_layer:
            raise ValueError(f"--n_dense_layer={self.n_dense_layer} leaves no expert layer of --n_layer={self.n_layer}: "
                             "lower it")
        if self.n_routed_experts % self.n_group or self.n_routed_experts < 2 * self.n_group:
            raise ValueError(f"--n_routed_experts={self.n_routed_experts} do not make --n_group={self.n_group} groups "
                             "of two or more each")
        choice = self.topk_group * self.n_routed_experts // self.n_group
        if self.topk_group > self.n_group or self.n_activated_experts > choice:
            raise ValueError(f"--n_activated_experts={self.n_activated_experts} of {choice} experts in "
                             f"--topk_group={self.topk_group} of {self.n_group} groups")
        if self.mtp and self.block_size < 2:
            raise ValueError(f"--block_size={self.block_size} has no token after the next: --mtp=false")


TINY = dict(block_size=64, vocab_size=256, n_layer=4, n_head=4, n_embd=128, q_lora_rank=64, kv_lora_rank=64,
            qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32, ffn_dim=384, moe_ffn_dim=64, init_std=0.02,
            log_dir=f"log/{ARCH}-tiny")


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, rounded to the precision of x, then times the weight (as DeepseekV3RMSNorm in transformers)."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.type_as(x)


def rope_table(block_size, dim, theta):
    """Cosine and sine of position * theta^(-2 i / dim): (2, block_size, dim / 2)."""
    angles = torch.outer(torch.arange(block_size), 1 / theta ** (torch.arange(0, dim, 2) / dim))
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x, rope):
    """Turn each pair of neighbours (x_2i, x_2i+1) by its angle: x (B, T, H, D), rope (2, T, D/2)."""
    cos, sin = rope[:, :, None]
    a, b = x.float()[..., ::2], x.float()[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).type_as(x)


class Attention(nn.Module):
    """Multi-head latent attention, equations 1 to 11. In training there is no cache that the latents keep small."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.rank = cfg.n_head, cfg.kv_lora_rank
        self.nope, self.rope, self.v = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
        self.q_a_proj = nn.Linear(cfg.n_embd, cfg.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(cfg.q_lora_rank)
        self.q_b_proj = nn.Linear(cfg.q_lora_rank, cfg.n_head * (self.nope + self.rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(cfg.n_embd, cfg.kv_lora_rank + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(cfg.kv_lora_rank)
        self.kv_b_proj = nn.Linear(cfg.kv_lora_rank, cfg.n_head * (self.nope + self.v), bias=False)
        self.o_proj = nn.Linear(cfg.n_head * self.v, cfg.n_embd, bias=False)

    def forward(self, x, rope):
        B, T, _ = x.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(B, T, self.n_head, -1)
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)  # (B, T, n_head, D)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.rank, self.rope], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(B, T, self.n_head, -1)
        k_nope, v = kv.split([self.nope, self.v], dim=-1)
        k_rope = rotate(k_rope[:, :, None], rope).expand(-1, -1, self.n_head, -1)  # one key for all heads
        q, k = torch.cat([q_nope, rotate(q_rope, rope)], dim=-1), torch.cat([k_nope, k_rope], dim=-1)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # last, so that y comes in x's memory order
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
    """Values and indices of the k largest in the last dimension; of equals the first. On CUDA torch.compile fuses a
    short sort with what is around it, but not torch.topk."""
    return (y[..., :k] for y in x.sort(dim=-1, descending=True, stable=True))


class Gate(nn.Module):
    """The router, equations 12 to 20."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.empty(cfg.n_routed_experts, cfg.n_embd))
        self.register_buffer("e_score_correction_bias", torch.zeros(cfg.n_routed_experts))
        self.register_buffer("load", torch.zeros(cfg.n_routed_experts), persistent=False)  # tokens since the update

    def forward(self, x):
        """x (B, T, C) -> experts int64 (B, T, K), their weights (B, T, K), balance loss"""
        cfg = self.cfg
        with torch.autocast(x.device.type, enabled=False):  # near-equal scores must not depend on bf16
            score = F.linear(x.float(), self.weight).sigmoid()  # (B, T, n_routed_experts)
        with torch.no_grad():
            choice = (score + self.e_score_correction_bias).unflatten(-1, (cfg.n_group, -1))
            best_two, _ = topk(choice, 2)
            _, groups = topk(best_two.sum(-1), cfg.topk_group)
            outside = torch.ones_like(choice[..., 0], dtype=torch.bool).scatter(-1, groups, False)
            _, expert = topk(choice.masked_fill(outside[..., None], -torch.inf).flatten(-2), cfg.n_activated_experts)
            if self.training:
                self.load += self.one_hot(expert).sum(1).sum(0)  # as one sum it would keep few of a GPU's cores busy
        weight = score.gather(-1, expert)  # without the bias
        weight = cfg.route_scale * weight / (weight.sum(-1, keepdim=True) + 1e-20)
        return expert, weight, self.balance_loss(score) if self.training else 0.0

    def one_hot(self, expert):
        """int64 (B, T, K) -> 1.0 at the chosen experts, (B, T, n_routed_experts)"""
        return (expert[..., None] == torch.arange(self.cfg.n_routed_experts, device=expert.device)).sum(-2).float()

    def balance_loss(self, score):
        """Equations 17 to 20, the mean over the sequences. Frequencies are of the choice without bias and groups."""
        _, expert = topk(score.detach(), self.cfg.n_activated_experts)
        frequency = self.one_hot(expert).mean(1) * self.cfg.n_routed_experts / self.cfg.n_activated_experts
        probability = (score / score.sum(-1, keepdim=True)).mean(1)  # (B, n_routed_experts), as frequency
        return self.cfg.balance_loss_alpha * (frequency * probability).sum(-1).mean()


class Permute(torch.autograd.Function):
    """x[order], where inverse undoes order: so the gradient is a gather too, not a sum by atomic additions."""

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

    F.grouped_mm is one kernel for bf16 on sm90 (H100), and the host never waits for the device. On an A100 it becomes a
    product per expert, for whose sizes the host does wait; the result is the same. On sm100 (B200) PyTorch has reported
    wrong gradients for experts without tokens (its issue 172439). torch.compile takes it in bf16 alone: in fp32
    `definition` stands in."""

    def __init__(self, cfg):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(cfg.n_routed_experts, 2 * cfg.moe_ffn_dim, cfg.n_embd))
        self.down_proj = nn.Parameter(torch.empty(cfg.n_routed_experts, cfg.n_embd, cfg.moe_ffn_dim))

    def forward(self, x, expert, weight):
        """x (N, C), expert int64 (N, K), weight (N, K) -> (N, C)"""
        autocast = torch.is_autocast_enabled(x.device.type)  # it does not know grouped_mm
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        x, gate_up_proj, down_proj = (y.to(dtype) for y in (x, self.gate_up_proj, self.down_proj))
        if torch.compiler.is_compiling() and dtype == torch.float32:
            return self.definition(x, expert, weight)
        N, K = expert.shape
        group, order = expert.flatten().sort(stable=True)  # the (token, expert) pairs by expert
        inverse = torch.empty_like(order).scatter(0, order, torch.arange(N * K, device=x.device))
        ends = torch.searchsorted(group, torch.arange(len(down_proj), device=x.device), right=True, out_int32=True)
        rows = Permute.apply(x.repeat_interleave(K, dim=0), order, inverse)
        gate, up = F.grouped_mm(rows, gate_up_proj.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        rows = F.grouped_mm(F.silu(gate) * up, down_proj.transpose(1, 2), offs=ends)
        y = Permute.apply(rows, inverse, order).view(N, K, -1)
        return (y * weight[..., None]).sum(1).to(dtype)

    def definition(self, x, expert, weight):
        """The same by computing every expert for every token: equation 12."""
        weight = weight.new_zeros(len(x), len(self.down_proj)).scatter(1, expert, weight)  # mostly 0
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
        """-> x (B, T, C), balance loss"""
        x = x + self.self_attn(self.input_layernorm(x), rope)
        y = self.mlp(self.post_attention_layernorm(x))
        y, balance_loss = (y, 0.0) if self.dense else y
        return x + y, balance_loss


class MTP(nn.Module):
    """Multi-token prediction of depth 1, equations 21 to 23: from what the model made of the tokens up to t and the
    embedding of t + 1, what the shared head turns into logits of t + 2. The published weights take [embedding; hidden],
    hidden behind the final norm; the paper's equation has the other order."""

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
    """Parameters carry the names of Hugging Face's DeepSeek-V3, but for mtp, which is not part of its model."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(cfg.vocab_size, cfg.n_embd),
            layers=nn.ModuleList(Block(cfg, dense=i < cfg.n_dense_layer) for i in range(cfg.n_layer)),
            norm=RMSNorm(cfg.n_embd)))
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight
        self.mtp = MTP(cfg) if cfg.mtp else None
        self.register_buffer("rope", rope_table(cfg.block_size, cfg.qk_rope_head_dim, cfg.rope_theta), persistent=False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # optimizer steps made
        self.register_buffer("maxvio", torch.zeros(()), persistent=False)
        for p in self.parameters():
            if p.dim() >= 2:
                nn.init.normal_(p, std=cfg.init_std)

    def embed(self, idx):
        x = self.model.embed_tokens(idx)
        if torch.is_autocast_enabled(idx.device.type):  # bf16 residual stream: half the memory traffic between products
            x = x.to(torch.get_autocast_dtype(idx.device.type))
        return x

    def decode(self, idx):
        """idx int64 (B, T) -> (B, T, C), sum of the layers' balance losses"""
        x, balance_loss, rope = self.embed(idx), 0.0, self.rope[:, :idx.size(1)]
        for block in self.model.layers:
            x, loss = block(x, rope)
            balance_loss = balance_loss + loss
        return self.model.norm(x), balance_loss

    def hidden(self, idx):
        """idx int64 (B, T) -> (B, T, C): what lm_head turns into logits."""
        return self.decode(idx)[0]

    def forward(self, idx, targets=None):
        """idx, targets int64 (B, T), targets of -1 do not count -> (logits (B, T, vocab_size), None) or (None, loss).
        The loss has the value of the next token's cross-entropy; while training its gradient is that of all losses."""
        hidden, more = self.decode(idx)
        if targets is None:
            return self.lm_head(hidden).float(), None
        loss = self.cross_entropy(hidden, targets)
        if not self.training:
            return None, loss
        if self.mtp is not None:
            ahead, balance_loss = self.mtp(hidden[:, :-1], self.embed(idx[:, 1:]), self.rope[:, :idx.size(1) - 1])
            early = self.updates < 10 / 14.8 * self.cfg.max_steps  # 10T of 14.8T tokens, section 4.2
            weight = torch.where(early, self.cfg.mtp_loss_weight, self.cfg.mtp_loss_weight / 3)
            more = more + balance_loss + weight * self.cross_entropy(ahead, targets[:, 1:])
        return None, loss + (more - more.detach())

    def cross_entropy(self, hidden, targets):
        return F.cross_entropy(self.lm_head(hidden).float().flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def update_bias(self, *_):
        """After each update: experts that got less than the mean of the whole batch gain gamma, the others lose it
        (section 2.1.2; Wang et al. 2024, arXiv 2408.15664, algorithm 1)."""
        gates = [module for module in self.modules() if isinstance(module, Gate)]
        load = torch.stack([gate.load for gate in gates])  # (layers, n_routed_experts)
        if dist.is_initialized():
            dist.all_reduce(load)
        mean = load.mean(1, keepdim=True)
        late = self.updates >= 14.3 / 14.8 * self.cfg.max_steps  # 14.3T of 14.8T tokens, section 4.2
        change = torch.where(late, 0.0, self.cfg.bias_update_speed) * (mean - load).sign()
        for gate, c in zip(gates, change):
            gate.e_score_correction_bias += c
            gate.load.zero_()
        self.maxvio.copy_((load.amax(1) / mean[:, 0] - 1).max())
        self.updates += 1

    def extra_logs(self):
        """maxvio: how much more than its share the busiest expert of the worst layer got in the last step."""
        return {"maxvio": self.maxvio}

    def num_params(self):
        """Without the block for multi-token prediction, as the paper counts; its own are `mtp`."""
        mtp = sum(p.numel() for p in self.mtp.parameters()) if self.mtp is not None else 0
        total = sum(p.numel() for p in self.parameters()) - mtp
        return {"total": total, "active": total - (self.cfg.n_layer - self.cfg.n_dense_layer) * self.idle(),
                "non_embedding": total - self.lm_head.weight.numel(), "mtp": mtp}

    def idle(self):
        """Parameters of the experts in a layer that a token does not use."""
        cfg = self.cfg
        return (cfg.n_routed_experts - cfg.n_activated_experts) * 3 * cfg.n_embd * cfg.moe_ffn_dim

    def flops_per_token(self):
        """Forward and backward: 6 N + 6 (d_qk + d_v) T a layer, N all that enters a matrix product for a token: with
        multi-token prediction its block too, and the head twice."""
        cfg, params, layers = self.cfg, self.num_params(), self.cfg.n_layer + self.cfg.mtp
        N = params["active"] + cfg.mtp * (params["mtp"] - self.idle() + self.lm_head.weight.numel())
        width = cfg.n_head * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim)
        return 6 * N + 6 * layers * width * cfg.block_size

    def configure_optimizers(self, cfg, device_type):
        """AdamW that decays matrices and the embedding, not norms; fused into one kernel; update_bias ends its step.
        With optimizer=muon the matrices inside the blocks go to Muon (Jordan et al. 2024), its step scaled to AdamW's
        (arXiv 2502.16982), but neither routers nor experts: torch's Muon takes no stacks of matrices."""
        blocks = [m.weight for m in self.modules() if isinstance(m, nn.Linear) and m is not self.lm_head]
        others = [p for m in self.modules() if isinstance(m, (nn.Embedding, Gate, Experts)) for p in m.parameters()]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        muon = cfg.optimizer == "muon"
        adamw = torch.optim.AdamW(
            [{"params": others if muon else others + blocks, "weight_decay": cfg.weight_decay},
             {"params": vectors, "weight_decay": 0.0}],
            lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=1e-8, fused=device_type in ("cuda", "cpu"))
        adamw.register_step_post_hook(self.update_bias)
        if not muon:
            return adamw
        return Optimizers([adamw, torch.optim.Muon(blocks, lr=cfg.learning_rate, weight_decay=cfg.weight_decay,
                                                   adjust_lr_fn="match_rms_adamw")])


def to_hf(model):
    """The same weights as a transformers DeepseekV3ForCausalLM, which has no multi-token prediction."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    cfg = model.cfg
    eot = 50256 if cfg.vocab_size > 50256 else 0
    hf = DeepseekV3ForCausalLM(DeepseekV3Config(
        vocab_size=cfg.vocab_size, max_position_embeddings=cfg.block_size, hidden_size=cfg.n_embd,
        intermediate_size=cfg.ffn_dim, moe_intermediate_size=cfg.moe_ffn_dim, num_hidden_layers=cfg.n_layer,
        num_attention_heads=cfg.n_head, num_key_value_heads=cfg.n_head, n_shared_experts=cfg.n_shared_experts,
        n_routed_experts=cfg.n_routed_experts, num_experts_per_tok=cfg.n_activated_experts, n_group=cfg.n_group,
        topk_group=cfg.topk_group, routed_scaling_factor=cfg.route_scale, norm_topk_prob=True,
        first_k_dense_replace=cfg.n_dense_layer, q_lora_rank=cfg.q_lora_rank, kv_lora_rank=cfg.kv_lora_rank,
        qk_nope_head_dim=cfg.qk_nope_head_dim, qk_rope_head_dim=cfg.qk_rope_head_dim, v_head_dim=cfg.v_head_dim,
        rms_norm_eps=1e-6, initializer_range=cfg.init_std, tie_word_embeddings=True, rope_interleave=True,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta}, num_mtp_layers=0,
        bos_token_id=eot, eos_token_id=eot, pad_token_id=None))
    hf.load_state_dict({name: x for name, x in model.state_dict().items() if not name.startswith(("mtp.", "updates"))})
    return hf


@one_line_errors()
def main():
    cfg, mode = parse_args(Config, TINY)
    # ==== training loop: identical in every train_*.py ====
    if mode.sample is not None or mode.export is not None:
        return use_checkpoint(cfg, mode, ARCH, Config, Model, to_hf)
    world = init_world(cfg.device, cfg.seed)
    accumulation = accumulation_steps(cfg, world)
    train_loader = ShardLoader(cfg, "train", world, synthetic=mode.bench)
    val_loader = ShardLoader(cfg, "val", world, synthetic=mode.bench)
    tokenizer = get_tokenizer(cfg.vocab_size) if cfg.hella_limit or cfg.sample_interval else None
    hellaswag = load_hellaswag(cfg, world, tokenizer)
    model = Model(cfg).to(world.device)
    optimizer = model.configure_optimizers(cfg, world.device.type)
    run = Run(cfg, ARCH, world, model, optimizer, mode.bench)  # loads the checkpoint to resume from
    if cfg.compile:
        # otherwise the graph is split at each DDP bucket, which prevents fusion
        torch._dynamo.config.optimize_ddp = False
        # run the backward pass of fp32 regions in fp32, as eager mode does
        torch._functorch.config.backward_pass_autocast = "off"
        model.compile(dynamic=False, fullgraph=True)
    ddp_model = model
    if world.size > 1:
        device_ids = None if world.device.type == "cpu" else [world.device]
        ddp_model = DDP(model, device_ids=device_ids, gradient_as_bucket_view=True,
                        bucket_cap_mb=100, broadcast_buffers=False)
    batches = train_loader.train_batches(run.start_step, accumulation)

    for step in range(run.start_step, cfg.max_steps + 1):  # `step` updates have been made
        last_step = step == cfg.max_steps or run.stopping

        # evaluate (a stopped run is evaluated after it resumes)
        evaluation_due = cfg.eval_interval and (step % cfg.eval_interval == 0 or last_step)
        if evaluation_due and not run.stopping:
            run.flush()
            model.eval()
            val_loss = torch.zeros((), device=world.device)
            with torch.no_grad(), world.autocast():
                for x, y, rows in val_loader.val_batches():
                    _, loss = model(x, y)
                    val_loss += loss * rows / val_loader.val_rows
            run.log_val(step, world.sum(val_loss).item())
            if hellaswag:
                run.log_hella(step, hellaswag.score(model))
            model.train()

        # sample
        if tokenizer and cfg.sample_interval and step and step % cfg.sample_interval == 0:
            run.show_sample(step, tokenizer)

        # save
        checkpoint_due = cfg.checkpoint_interval and step % cfg.checkpoint_interval == 0
        if last_step or (checkpoint_due and step > run.start_step):
            run.save(step)
        if last_step:
            break

        # train
        run.begin_update()
        lr = cosine_lr(cfg, step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)  # RWKV's w0 learns at twice the rate
        train_loss = torch.zeros((), device=world.device)
        for micro_step in range(accumulation):
            x, y, _ = next(batches)
            # DDP averages the gradients over the processes only in the last micro-step
            if world.size > 1:
                ddp_model.require_backward_grad_sync = micro_step == accumulation - 1
            with world.autocast():
                _, loss = ddp_model(x, y)
                loss = loss / accumulation
            loss.backward()
            train_loss += loss.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        run.log_train(step, train_loss, norm, lr)
    del ddp_model  # DDP must go before the process group, or the shutdown can deadlock
    run.close()
    # ==== end of training loop ====


if __name__ == "__main__":
    main()
