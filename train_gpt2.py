"""
GPT-2 124M (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"): the
baseline to which the other scripts are compared.
- It is a transformer decoder. Each block adds causal multi-head attention, and then an MLP of four
  times the width, to the residual stream.
- LayerNorm stands in front of both, and once more after the last block (section 2.3).
- Positions are learned, up to a context of 1,024.
- The MLP's activation is GELU in its tanh form (OpenAI's src/model.py).
- All linear layers but the output head have biases; the head is the token embedding.
- The output projections of attention and MLP start smaller than the rest, by 1 / sqrt(number of
  residual layers), of which a block has two (section 2.3).
It has 124,475,904 parameters, with the vocabulary padded from 50,257 to 50,304. There is no
dropout, as the default run sees each token at most once.

What to expect: OpenAI's GPT-2 124M, trained on other data, scores 0.2955 on HellaSwag as this
script logs it. In the small runs of the README GPT-2 ends 0.23 above LLaMA in validation loss;
rotary positions alone would close more than half of this gap.

Run it:
  python train_gpt2.py --tiny                # a small model on built-in text, minutes on a CPU
  python train_gpt2.py                       # one GPU, after python fineweb.py
  torchrun --nproc_per_node=8 train_gpt2.py  # eight GPUs: the same result, sooner
  torchrun --nproc_per_node=8 train_gpt2.py --resume=auto
  python train_gpt2.py --sample="Hello, I'm a language model,"
and on each of two nodes, where HOST is the address of one of them:
  torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST train_gpt2.py
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from common import (RunConfig, ShardLoader, accumulation_steps, configure_compiler, cosine_lr,
                    init_world, parse_args, row_losses)
from fineweb import explain, get_tokenizer, n_tokens, one_line_errors, padded_size, vocab_of
from hellaswag import load_hellaswag
from muon import Muon, Optimizers
from run import Run, check_memory, use_checkpoint

ARCH = "gpt2"


@dataclass
class Config(RunConfig):
    # model
    block_size: int = 1024  # context length in tokens
    vocab_size: int = 50304  # size of the embedding; by default the tokens of data_dir and padding
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # number of attention heads
    n_embd: int = 768  # width of the residual stream
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
    matrix_lr: float = 1.0  # the same for the matrices in the blocks
    vector_lr: float = 1.0  # the same for all other parameters
    init_from: str = ""  # published model to start from: gpt2, gpt2-medium, ..., or a folder
    # run: see RunConfig in common.py
    log_dir: str = f"log/{ARCH}"
    training_options = RunConfig.training_options | {"init_from"}

    def __post_init__(self):
        if self.n_head < 1 or self.n_embd % self.n_head:
            raise ValueError(f"--n_embd={self.n_embd} is not a multiple of --n_head={self.n_head}")


TINY = dict(block_size=64, n_layer=4, n_head=4, n_embd=128, log_dir=f"log/{ARCH}-tiny")


class CausalSelfAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.c_attn = nn.Linear(cfg.n_embd, 3 * cfg.n_embd)  # q, k, v of all heads in one product
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, C/H)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # scaled by 1/sqrt(C/H)
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
        self.ln_1 = nn.LayerNorm(cfg.n_embd)
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
        cfg = with_published_shape(cfg)
        self.cfg = replace(cfg, init_from="")  # so that a checkpoint does not load it again
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(cfg.vocab_size, cfg.n_embd),
            wpe=nn.Embedding(cfg.block_size, cfg.n_embd),
            h=nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer)),
            ln_f=nn.LayerNorm(cfg.n_embd)))
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:  # OpenAI's positions start with a std of 0.01
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if cfg.init_from:
            self.load_state_dict(transpose_conv1d(published_weights(cfg.init_from)))

    def hidden(self, idx):
        """Return what lm_head turns into logits: idx int64 (B, T) -> (B, T, C)."""
        tr = self.transformer
        x = tr.wte(idx) + tr.wpe.weight[:idx.size(1)]
        if torch.is_autocast_enabled(idx.device.type):
            # a bf16 residual stream halves the memory traffic between matrix products
            x = x.to(torch.get_autocast_dtype(idx.device.type))
        for block in tr.h:
            x = block(x)
        return tr.ln_f(x)

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
        for block in self.transformer.h:
            block.compile(**options)
        self.loss = torch.compile(self.loss, **options)

    def num_params(self):
        total = sum(p.numel() for p in self.parameters())
        embedding = self.transformer.wte.weight.numel() + self.transformer.wpe.weight.numel()
        return {"total": total, "active": total, "non_embedding": total - embedding}

    def flops_per_token(self):
        """Return the FLOPs of forward and backward pass: 6 N + 12 L d T (PaLM paper, appendix B),
        for N parameters without the positions, L layers of width d, and T positions."""
        cfg = self.cfg
        n = self.num_params()["total"] - self.transformer.wpe.weight.numel()
        return 6 * n + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size

    def configure_optimizers(self, cfg, device_type):
        """Return a fused AdamW, with weight decay for matrices and embeddings but not for biases
        and norms. With --optimizer=muon Muon updates the matrices inside the blocks instead, and
        those of queries, keys and values, which are stored as one, separately."""
        embd = {"params": [self.transformer.wte.weight, self.transformer.wpe.weight],
                "weight_decay": cfg.weight_decay, "lr_scale": cfg.embd_lr}
        matrices = {"weight_decay": cfg.weight_decay, "lr_scale": cfg.matrix_lr}
        blocks = self.transformer.h
        groups = [
            {**matrices, "params": [block.attn.c_attn.weight for block in blocks],
             "rows": 3 * [cfg.n_embd]},
            {**matrices, "params": [m.weight for block in blocks for m in (
                block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)]}]
        vectors = {"params": [p for p in self.parameters() if p.dim() < 2],
                   "weight_decay": 0.0, "lr_scale": cfg.vector_lr}
        muon = cfg.optimizer == "muon"
        adamw = torch.optim.AdamW(
            [embd, vectors] if muon else [embd, *groups, vectors], lr=cfg.learning_rate,
            betas=(cfg.beta1, cfg.beta2), eps=1e-8, fused=device_type in ("cuda", "cpu"))
        return Optimizers([adamw, Muon(groups, lr=cfg.learning_rate)]) if muon else adamw


def with_published_shape(cfg):
    """Return cfg with the shape of the model that --init_from names, without padded vocabulary."""
    if not cfg.init_from:
        return cfg
    with explain(f"--init_from={cfg.init_from}", Exception):  # transformers raises many types
        from transformers import AutoConfig
        hf = AutoConfig.from_pretrained(cfg.init_from)
        if hf.model_type != "gpt2":
            raise ValueError(f"a model of type {hf.model_type}, not gpt2")
        vocab = vocab_of(cfg.data_dir)
        if vocab and not n_tokens(vocab) <= hf.vocab_size <= padded_size(vocab):
            raise ValueError(f"its {hf.vocab_size} tokens are not the {n_tokens(vocab)} of "
                             f"--data_dir={cfg.data_dir}")
        cfg = replace(cfg, block_size=hf.n_positions, vocab_size=hf.vocab_size,
                      n_layer=hf.n_layer, n_head=hf.n_head, n_embd=hf.n_embd)
        if unknown := unknown_settings(hf, hf_config(cfg)):
            raise ValueError(f"train_gpt2.py has no {', '.join(unknown)}")
    return cfg


def unknown_settings(hf, ours):
    """Return the settings in which a published GPT2Config computes something else than ours, as
    text. All settings that differ count, but for those known to change no logits: so a setting that
    is yet to be invented counts, too."""
    from transformers import GenerationConfig
    # names and file formats; heads of other classes; how to generate; the initialisation, which the
    # weights replace; dropout, which this script lacks
    harmless = {"_name_or_path", "architectures", "dtype", "torch_dtype", "torchscript",
                "gradient_checkpointing", "keys_to_ignore_at_inference", "output_past", "prefix",
                "is_decoder", "n_special", "predict_special_tokens", "sep_token_id",
                "tokenizer_class",
                "id2label", "label2id", "_num_labels", "num_labels", "problem_type",
                "finetuning_task", "task_specific_params", "summary_type", "summary_use_proj",
                "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
                *GenerationConfig().to_dict(), "initializer_range",
                "attn_pdrop", "embd_pdrop", "resid_pdrop"}
    # what old versions of transformers wrote into every config.json
    old = {"pruned_heads": {}, "use_bfloat16": False,
           "is_encoder_decoder": False, "chunk_size_feed_forward": 0}
    theirs, ours = hf.to_dict(), old | ours.to_dict()
    if hf.n_inner == 4 * hf.n_embd:
        theirs["n_inner"] = None  # which means the same
    return [f"{name}={value!r}" for name, value in theirs.items()
            if name not in harmless and (name not in ours or value != ours[name])]


def published_weights(name):
    """Return the state dict of a published GPT2LMHeadModel, in Hugging Face's form."""
    with explain(f"--init_from={name}", Exception):
        import transformers
        transformers.logging.set_verbosity_error()  # what it would warn of is an error here
        hf, info = transformers.GPT2LMHeadModel.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True)
        for kind in "missing_keys", "unexpected_keys", "mismatched_keys":
            keys = [key if isinstance(key, str) else key[0] for key in info[kind]]
            # an old file also holds the causal mask and the score of masked positions
            keys = [key for key in keys if not key.endswith((".attn.bias", ".attn.masked_bias"))]
            if keys:
                raise ValueError(f"{kind.replace('_', ' ')}: {', '.join(sorted(keys))}")
        state_dict = hf.state_dict()
        if not torch.equal(state_dict["lm_head.weight"], state_dict["transformer.wte.weight"]):
            raise ValueError("lm_head.weight is not the embedding, wte.weight, as in GPT-2")
    return state_dict


def transpose_conv1d(state_dict):
    """Convert weights from Hugging Face's form to ours or back: its Conv1D stores a matrix as
    (in, out), nn.Linear as (out, in)."""
    names = "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"
    return {k: v.t() if k.endswith(names) else v for k, v in state_dict.items()}


def hf_config(cfg):
    """Return the GPT2Config of a transformers model of the same shape."""
    from transformers import GPT2Config
    return GPT2Config(
        vocab_size=cfg.vocab_size, n_positions=cfg.block_size, n_embd=cfg.n_embd,
        n_layer=cfg.n_layer, n_head=cfg.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None, n_ctx=cfg.block_size)  # llama.cpp reads n_ctx


def to_hf(model):
    """Return a transformers GPT2LMHeadModel with the same weights."""
    from transformers import GPT2LMHeadModel
    hf = GPT2LMHeadModel(hf_config(model.cfg))
    hf.load_state_dict(transpose_conv1d(model.state_dict()))
    return hf


@one_line_errors()
def main():
    cfg, mode = parse_args(Config, TINY)
    cfg = with_published_shape(cfg)  # changes nothing without --init_from
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
