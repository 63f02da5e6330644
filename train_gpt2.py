"""
GPT-2 124M (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), the baseline that the other
scripts differ from:
- a transformer decoder: causal multi-head attention, then an MLP of four times the width, both added to the residual
- LayerNorm in front of each of them (section 2.3: moved to the input of each sub-block, one more after the last block)
- learned absolute positions, context 1024
- GELU in its tanh form (OpenAI's src/model.py)
- biases everywhere, the output head is the token embedding
- residual projections start smaller by 1/sqrt(number of residual layers) (two a block, section 2.3)
124,475,904 parameters with the vocabulary padded from 50,257 to 50,304. No dropout: one pass over the data.

    python train_gpt2.py --tiny                            # no data, no GPU: a minute on a laptop
    python train_gpt2.py                                   # one GPU, after python fineweb.py
    torchrun --nproc_per_node=8 train_gpt2.py              # eight GPUs: the same result, sooner
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_gpt2.py  # on each node
    torchrun --nproc_per_node=8 train_gpt2.py --resume=auto
    python train_gpt2.py --sample="Hello, I'm a language model,"
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from common import (DataLoader, Optimizers, Run, accumulation_steps, cosine_lr, default_device, fail, get_tokenizer,
                    init_world, load_hellaswag, one_line_errors, parse_args, use_checkpoint)

ARCH = "gpt2"


@dataclass
class Config:
    # model
    block_size: int = 1024  # context length, tokens
    vocab_size: int = 50304  # GPT-2's 50,257 tokens padded to a multiple of 128; below 50257 text is taken as bytes
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # width of the residual stream
    init_from: str = ""  # published weights and shape to start from: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder
    # training
    total_batch_size: int = 524288  # tokens per step
    batch_size: int = 64  # sequences per device and micro-step: lower it when memory runs out, the result is the same
    max_steps: int = 19073  # steps; x 524,288 tokens: 10.0B, each token of FineWeb sample-10BT at most once
    warmup_steps: int = 715  # steps of linear warm-up, 375M tokens as GPT-3
    learning_rate: float = 6e-4  # peak, GPT-3 table 2.1
    min_lr_ratio: float = 0.1  # the cosine ends at this part of the peak
    weight_decay: float = 0.1  # on matrices and embeddings
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # global gradient norm
    seed: int = 1337  # of initialisation and samples
    eval_interval: int = 250  # steps between evaluations: validation loss and HellaSwag; 0: never
    val_tokens: int = 10485760  # validation tokens, from the start of the validation shard
    hella_limit: int = 10042  # HellaSwag items to score; 0: none
    checkpoint_interval: int = 1000  # steps between checkpoints; 0: only the last
    keep_checkpoints: int = 0  # the newest so many checkpoints stay; 0: all
    sample_interval: int = 1000  # steps between text samples on the console; 0: never
    data_dir: str = "fineweb10B"  # folder of token shards
    log_dir: str = "log/gpt2"  # folder of this run: log, checkpoints
    hellaswag_file: str = "hellaswag_val.jsonl"  # validation items; the default is downloaded when missing
    resume: str = ""  # checkpoint to go on from; auto: the newest in log_dir
    device: str = default_device()  # cuda, mps or cpu
    compile: bool = torch.cuda.is_available()  # torch.compile the model
    optimizer: str = "adamw"  # adamw, or muon for the matrices inside the blocks
    tiny: bool = False  # a small model on built-in text: about a minute on a CPU

    def __post_init__(self):
        if self.init_from:  # their shape counts; their vocabulary is not padded
            hf = published("GPT2Config", self.init_from)
            self.block_size, self.vocab_size = hf.n_positions, hf.vocab_size
            self.n_layer, self.n_head, self.n_embd = hf.n_layer, hf.n_head, hf.n_embd
        if self.n_head < 1 or self.n_embd % self.n_head:
            raise ValueError(f"--n_embd={self.n_embd} is not a multiple of --n_head={self.n_head}")


TINY = dict(block_size=64, vocab_size=256, n_layer=4, n_head=4, n_embd=128, log_dir="log/gpt2-tiny")


class CausalSelfAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.c_attn = nn.Linear(cfg.n_embd, 3 * cfg.n_embd)  # q, k, v of all heads in one product
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, C/H)
                   for z in self.c_attn(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # flash attention, scale 1/sqrt(C/H)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.c_fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd)
        self.c_proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd)  # eps 1e-5
        self.attn = CausalSelfAttention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd)
        self.mlp = MLP(cfg)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Model(nn.Module):
    """Parameters carry the names of OpenAI's and Hugging Face's GPT-2."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(cfg.vocab_size, cfg.n_embd),
            wpe=nn.Embedding(cfg.block_size, cfg.n_embd),
            h=nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer)),
            ln_f=nn.LayerNorm(cfg.n_embd)))
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:  # positions too (OpenAI's code has 0.01 there, Hugging Face's 0.02); norms keep (1, 0)
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.n_layer) if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if cfg.init_from:
            self.load_state_dict(transpose_conv1d(published("GPT2LMHeadModel", cfg.init_from).state_dict()))
            self.cfg = replace(cfg, init_from="")  # a checkpoint of this model stands on its own

    def hidden(self, idx):
        """idx int64 (B, T) -> (B, T, C): what lm_head turns into logits."""
        tr = self.transformer
        x = tr.wte(idx) + tr.wpe.weight[:idx.size(1)]
        if torch.is_autocast_enabled(idx.device.type):  # bf16 residual stream: half the memory traffic between products
            x = x.to(torch.get_autocast_dtype(idx.device.type))
        for block in tr.h:
            x = block(x)
        return tr.ln_f(x)

    def forward(self, idx, targets=None):
        """idx, targets int64 (B, T), targets of -1 do not count -> (logits (B, T, vocab_size), None) or (None, loss)"""
        logits = self.lm_head(self.hidden(idx)).float()
        if targets is None:
            return logits, None
        return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def num_params(self):
        total = sum(p.numel() for p in self.parameters())
        embedding = self.transformer.wte.weight.numel() + self.transformer.wpe.weight.numel()
        return {"total": total, "active": total, "non_embedding": total - embedding}

    def flops_per_token(self):
        """Forward and backward: 6 N + 12 L d T, N all parameters but the positions."""
        cfg = self.cfg
        n = self.num_params()["total"] - self.transformer.wpe.weight.numel()
        return 6 * n + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size

    def configure_optimizers(self, cfg, device_type):
        """AdamW that decays matrices and embeddings, not biases and norms; fused into one kernel. With optimizer=muon
        the matrices inside the blocks go to Muon (Jordan et al. 2024), its step scaled to AdamW's (arXiv 2502.16982)."""
        blocks = [p for p in self.transformer.h.parameters() if p.dim() == 2]
        embeddings = [self.transformer.wte.weight, self.transformer.wpe.weight]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        muon = cfg.optimizer == "muon"
        adamw = torch.optim.AdamW(
            [{"params": embeddings if muon else embeddings + blocks, "weight_decay": cfg.weight_decay},
             {"params": vectors, "weight_decay": 0.0}],
            lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=1e-8, fused=device_type in ("cuda", "cpu"))
        if not muon:
            return adamw
        return Optimizers([adamw, torch.optim.Muon(blocks, lr=cfg.learning_rate, weight_decay=cfg.weight_decay,
                                                   adjust_lr_fn="match_rms_adamw")])


def published(kind, name):
    """The GPT2Config or GPT2LMHeadModel of a Hugging Face name or folder."""
    try:
        import transformers
        return getattr(transformers, kind).from_pretrained(name)
    except (ImportError, OSError) as e:
        fail(f"--init_from={name}: {e}")


def transpose_conv1d(state_dict):
    """Between Hugging Face and here: its Conv1D stores (in, out), nn.Linear (out, in)."""
    names = "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"
    return {k: v.t() if k.endswith(names) else v for k, v in state_dict.items()}


def to_hf(model):
    """The same weights as a transformers GPT2LMHeadModel."""
    from transformers import GPT2Config, GPT2LMHeadModel
    cfg = model.cfg
    eot = 50256 if cfg.vocab_size > 50256 else 0
    hf = GPT2LMHeadModel(GPT2Config(
        vocab_size=cfg.vocab_size, n_positions=cfg.block_size, n_embd=cfg.n_embd, n_layer=cfg.n_layer,
        n_head=cfg.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=eot, eos_token_id=eot))
    hf.load_state_dict(transpose_conv1d(model.state_dict()))
    return hf


@one_line_errors()
def main():
    # ==== training loop: identical in every train_*.py ====
    cfg, mode = parse_args(Config, TINY)
    if mode.sample is not None or mode.export is not None:
        return use_checkpoint(cfg, mode, ARCH, Config, Model, to_hf)
    world = init_world(cfg)
    accumulation = accumulation_steps(cfg, world)
    train_loader, val_loader = (DataLoader(cfg, split, world, mode.bench) for split in ("train", "val"))
    tokenizer = get_tokenizer(cfg.vocab_size) if cfg.hella_limit or cfg.sample_interval else None
    hellaswag = load_hellaswag(cfg, world, tokenizer)
    raw_model = Model(cfg).to(world.device)
    optimizer = raw_model.configure_optimizers(cfg, world.device.type)
    run = Run(cfg, ARCH, world, raw_model, optimizer, mode.bench)
    if cfg.compile:
        torch._dynamo.config.optimize_ddp = False  # else DDP cuts the graph at every bucket, and fusions with it
        torch._functorch.config.backward_pass_autocast = "off"  # as uncompiled: what is kept in fp32 goes back in fp32
        raw_model.compile(dynamic=False, fullgraph=True)
    model = raw_model
    if world.size > 1:
        model = DDP(raw_model, device_ids=None if world.device.type == "cpu" else [world.device],
                    gradient_as_bucket_view=True, bucket_cap_mb=100, broadcast_buffers=False)
    batches = train_loader.train_batches(run.start_step, accumulation)

    for step in range(run.start_step, cfg.max_steps + 1):  # `step` updates have been made
        last_step = step == cfg.max_steps or run.stopping
        if cfg.eval_interval and (step % cfg.eval_interval == 0 or last_step) and not run.stopping:  # else when resumed
            run.flush()
            raw_model.eval()
            val_loss = torch.zeros((), device=world.device)
            with torch.no_grad(), world.autocast():
                for x, y, rows in val_loader.val_batches():
                    val_loss += raw_model(x, y)[1] * rows / val_loader.val_rows
            run.val(step, world.sum(val_loss).item())
            if hellaswag:
                run.hella(step, hellaswag.score(raw_model)[1])
            raw_model.train()
        if tokenizer and cfg.sample_interval and step and step % cfg.sample_interval == 0:
            run.sample(step, tokenizer)
        if last_step or (cfg.checkpoint_interval and step > run.start_step and step % cfg.checkpoint_interval == 0):
            run.save(step)
        if last_step:
            break

        lr = cosine_lr(cfg, step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)  # some papers give a group its own pace
        train_loss = torch.zeros((), device=world.device)
        for micro_step in range(accumulation):
            x, y, _ = next(batches)
            if world.size > 1:  # average the gradients over processes once a step; DDP reads this in its forward
                model.require_backward_grad_sync = micro_step == accumulation - 1
            with world.autocast():
                loss = model(x, y)[1] / accumulation
            loss.backward()
            train_loss += loss.detach()
        norm = nn.utils.clip_grad_norm_(raw_model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        run.train(step, train_loss, norm, lr)
    del model  # else DDP is the last owner of the process group, and to take that down it may wait for itself
    run.close()
    # ==== end of training loop ====


if __name__ == "__main__":
    main()
