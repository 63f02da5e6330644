"""
What every train_<arch>.py uses: options, processes, the loader of token shards, the schedule of the
learning rate, and tokens from text. Nothing here knows what a layer is. A script's Model has
    cfg                          its Config, from which the same model can be built again
    forward(idx, targets=None)   (logits, None) without targets, (None, loss) with them
    hidden(idx), lm_head(x)      forward in two parts: hidden gives (B, T, C), lm_head the logits
    num_params()                 {"total": int, "active": int, "non_embedding": int, ...}
    flops_per_token()            FLOPs of forward and backward pass
    configure_optimizers(cfg, device_type)  an optimizer with every parameter in exactly one group,
                                 whose lr_scale is its multiple of the learning rate
and, where needed, extra_logs() -> {name: scalar tensor}, to be logged with every update, and
new_state(B) -> a state from which hidden(idx, state) continues, and which it updates.
"""
import argparse
import difflib
import hashlib
import inspect
import itertools
import math
import os
import re
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from importlib.util import find_spec

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, by DDP, it would keep the process group for good
import torch.nn.functional as F

from fineweb import (GPT2_TOKENS, Parser, TokenSequence, boolean, explain, fail, missing_shards,
                     n_tokens, open_shards, padded_size, token_lengths, vocab_of,
                     write_builtin_text)

HAS_TRITON = find_spec("triton") is not None  # torch.compile needs it on GPUs; Windows lacks it
BENCH_WARMUP = 5  # steps that --bench does not count: compilation and the first allocations
# what --tiny changes; each script adds the size of its model
TINY_TRAINING = dict(
    total_batch_size=1024, batch_size=16, max_steps=400, warmup_steps=20, learning_rate=1e-2,
    optimizer="muon", eval_interval=100, val_tokens=32768, val_full_tokens=0, hella_limit=0,
    checkpoint_interval=200, sample_interval=400, data_dir="tiny_data", compile=False,
    vocab_size=320)  # 256 bytes, <|endoftext|> and padding


# ---- options -------------------------------------------------------------------------------------

def default_device():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_dtype(device):
    """Return the name of the best dtype for matrix products: bfloat16 if all GPUs have it (compute
    capability 8.0, from A100 and RTX 30 on), float16 if not, float32 without a GPU."""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return "float32"
    oldest = min(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
    return "bfloat16" if oldest >= (8, 0) else "float16"


@dataclass
class RunConfig:
    """Where, when and how a run runs. The Config of a script adds its model and its training. The
    comment beside a field is its text in --help."""
    seed: int = 1337  # seed of the initialisation and of text samples
    eval_interval: int = 250  # steps between evaluations (validation loss, HellaSwag); 0: never
    val_tokens: int = 2621440  # tokens to evaluate on, from the start of the validation shard
    val_bytes: int = 0  # if not 0, evaluate on so many bytes instead, to compare vocabularies
    val_full_tokens: int = 10485760  # tokens to evaluate on after the last step (val_full); 0: none
    hella_limit: int = 10042  # number of HellaSwag items to score; 0: none
    checkpoint_interval: int = 1000  # steps between checkpoints; 0: only at the end
    keep_checkpoints: int = 0  # keep only the newest N checkpoints; 0: all
    sample_interval: int = 1000  # steps between text samples on the console; 0: never
    data_dir: str = "fineweb10B"  # folder of the token shards
    log_dir: str = "log"  # folder of this run: log, checkpoints
    hellaswag_file: str = "hellaswag_val.jsonl"  # HellaSwag's items; downloaded if missing
    resume: str = ""  # checkpoint to resume from; auto: the newest in log_dir
    device: str = default_device()  # cuda, mps or cpu
    dtype: str = default_dtype(default_device())  # of matrix products: bfloat16, float16, float32
    compile: bool = torch.cuda.is_available() and HAS_TRITON  # compile the model with torch.compile
    tiny: bool = False  # train a small model on built-in text, in a few minutes on a CPU

    # names of options that shape the training, not the model; a script may add its own
    training_options = {
        "total_batch_size", "batch_size", "max_steps", "warmup_steps", "learning_rate",
        "min_lr_ratio", "weight_decay", "beta1", "beta2", "grad_clip", "optimizer", "embd_lr",
        "head_lr", "matrix_lr", "vector_lr"}
    # least <= value < bound; options not listed: whole numbers from 1, other numbers from 0
    limits = {"beta1": (0, 1), "beta2": (0, 1), "seed": (0, 2**63), "n_embd": (1, 2**20),
              "n_head": (1, 2**20), "rope_theta": (1, 1e30), "rope_theta_local": (1, 1e30)}
    limits |= dict.fromkeys((
        "max_steps", "warmup_steps", "eval_interval", "val_bytes", "val_full_tokens", "hella_limit",
        "checkpoint_interval", "keep_checkpoints", "sample_interval", "bench"), (0, 2**40))

    @classmethod
    def option_groups(cls):
        """Return the names of the options by what they describe: model, training, run."""
        names = [f.name for f in fields(cls)]
        run = [f.name for f in fields(RunConfig)]
        training = [name for name in names if name in cls.training_options]
        model = [name for name in names if name not in run + training]
        return {"model": model, "training": training, "run": run}


def make_parser(Config):
    """Return a parser with an option for every field of Config, and for the modes."""
    source = inspect.getsource(RunConfig) + inspect.getsource(Config)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))
    parser = Parser(allow_abbrev=False, description=sys.modules[Config.__module__].__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    by_name = {f.name: f for f in fields(Config)}
    for title, names in Config.option_groups().items():
        group = parser.add_argument_group(title)
        for name in names:
            kind, default = by_name[name].type, by_name[name].default
            kinds = dict(type=boolean, nargs="?", const=True) if kind is bool else dict(type=kind)
            text = f"{comments[name]} ({default=})".replace("%", "%%")
            group.add_argument(f"--{name}", metavar=kind.__name__, help=text, **kinds)
    modes = parser.add_argument_group("instead of training")
    modes.add_argument("--sample", metavar="TEXT",
                       help="continue TEXT with the newest checkpoint, or with --resume=FILE")
    modes.add_argument("--max_new_tokens", metavar="N", type=int, default=100,
                       help="length of the continuation that --sample writes (%(default)s)")
    modes.add_argument("--temperature", metavar="X", type=float, default=0.8,
                       help="how freely --sample chooses (%(default)s); 0: the likeliest token")
    modes.add_argument("--export", metavar="DIR",
                       help="write the newest checkpoint as a Hugging Face folder, or as "
                            "model.pth if transformers lacks the model")
    modes.add_argument("--bench", metavar="N", type=int, default=0,
                       help="time N training steps on random tokens, write nothing")
    return parser


def nearest_divisor(n, goal):
    """Return the divisor of n that is nearest to goal; if two are equally near, the larger."""
    return min((d for d in range(n, 0, -1) if n % d == 0), key=lambda d: abs(d - goal))


def follow_n_embd(defaults, given):
    """Return the widths of a model whose n_embd or n_head is given: heads keep their width, and the
    other widths their proportion to n_embd. defaults, given: dicts of options."""
    n_embd = given.get("n_embd", defaults["n_embd"])
    scale = n_embd / defaults["n_embd"]
    names = {"ffn_dim", "moe_ffn_dim", "q_lora_rank", "kv_lora_rank"} & defaults.keys()
    widths = {name: max(8, 8 * round(defaults[name] * scale / 8)) for name in names}
    if "n_head" in defaults:
        # the width of a head is even, because rotary positions rotate pairs
        widths["n_head"] = nearest_divisor(max(1, n_embd // 2), defaults["n_head"] * scale)
    if "n_kv_head" in defaults:
        n_head = given.get("n_head", widths["n_head"])
        share = defaults["n_kv_head"] / defaults["n_head"]
        widths["n_kv_head"] = nearest_divisor(n_head, n_head * share)
    return widths


def parse_args(Config, tiny):
    """Parse the command line and return (cfg, mode).

    tiny: what --tiny changes in the script's model. mode has the attributes `sample` and `export`
    (str, None if not given), `bench` (number of steps, 0 if not given), `max_new_tokens` (int) and
    `temperature` (float)."""
    parser = make_parser(Config)
    mode, unknown = parser.parse_known_args()
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, 1)
        hint = f", did you mean {near[0]}?" if near else ""
        parser.error(f"unknown option {unknown[0]}{hint}")
    values = {f.name: getattr(mode, f.name) for f in fields(Config)}
    given = {name: value for name, value in values.items() if value is not None}
    given.setdefault("dtype", default_dtype(given.get("device", RunConfig.device)))
    defaults = {f.name: f.default for f in fields(Config)}
    if given.get("tiny"):
        defaults |= {**TINY_TRAINING, **tiny}
        torch.set_num_threads(1)  # more threads gain nothing, and lose much on busy cores
    data_dir = given.get("data_dir", defaults["data_dir"])  # --tiny writes its own later
    trains = mode.sample is None and mode.export is None  # a checkpoint has its own vocabulary
    if trains and not (given.get("tiny") and data_dir == TINY_TRAINING["data_dir"]):
        defaults["vocab_size"] = padded_size(vocab_of(data_dir))
    numbers = {name: getattr(mode, name) for name in ("bench", "max_new_tokens", "temperature")}
    for name, value in {**given, **numbers}.items():
        default_limits = (0, 1e35) if isinstance(value, float) else (1, 2**40)
        least, bound = Config.limits.get(name, default_limits)
        if type(value) in (int, float) and not least <= value < bound:
            fail(f"--{name}={value} is out of range: at least {least}, less than {bound}")
    choices = {"optimizer": ("adamw", "muon"), "dtype": ("bfloat16", "float16", "float32")}
    for name, known in choices.items():
        if given.get(name, known[0]) not in known:
            fail(f"--{name}={given[name]} is unknown: use {', '.join(known)}")
    given = {**defaults, **follow_n_embd(defaults, given), **given}
    if (mode.sample is not None) + (mode.export is not None) + (mode.bench > 0) > 1:
        fail("--sample, --export and --bench: use one at a time")
    if mode.bench:
        given |= dict(max_steps=mode.bench + BENCH_WARMUP, eval_interval=0, hella_limit=0,
                      sample_interval=0, resume="")
    try:
        return Config(**given), mode
    except ValueError as e:
        fail(e)


# ---- processes and devices -----------------------------------------------------------------------

@dataclass
class World:
    """The processes of this run, and the device of this one."""
    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    dtype: torch.dtype = torch.float32  # of matrix products

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def sum(self, x):
        """Sum x over all processes, in place, and return it. It is a sum because gloo, which
        connects processes on CPUs, cannot average."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def check_same(self, what, value):
        """End the program if a value is not the same in all processes. what: its name."""
        number = torch.tensor(zlib.crc32(repr(value).encode()), device=self.device)
        if dist.is_initialized() and self.sum(number.clone()) != number * self.size:
            fail(f"the processes differ in {what}: give all machines the same files and options")

    def local_first(self, write_files):
        """Call write_files() in one process of each machine while the others wait. The machines
        take turns, since they may share the disk."""
        for rank in range(self.size):
            if rank == self.rank and self.local_rank == 0:
                write_files()
            if self.size > 1:
                dist.barrier()


def init_world(device, dtype, seed):
    """Join the process group if torchrun started this process, choose the device, seed torch."""
    launch = "cannot join the processes of WORLD_SIZE, RANK and so on: use torchrun, or unset them"
    with explain(launch, ValueError):
        rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
        size = int(os.environ.get("WORLD_SIZE", 1))
        if not 0 <= rank < size:
            raise ValueError(f"RANK={rank} of WORLD_SIZE={size}")
    if sys.stdout:  # it is None if the console was closed beforehand
        sys.stdout.reconfigure(errors="replace")  # samples may hold what the terminal cannot show
    try:
        world = World(torch.device(device), rank, size, local_rank, getattr(torch, dtype))
        if world.device.type == "cuda":
            index = local_rank if size > 1 else world.device.index or 0
            world.device = torch.device("cuda", index)
            torch.cuda.set_device(world.device)
            torch.set_float32_matmul_precision("high")
        torch.empty(1, device=world.device)
        usable = world.device.type in ("cuda", "mps", "cpu")
    except (RuntimeError, AssertionError, AttributeError):  # what missing backends raise differs
        usable = False
    if not usable:
        fail(f"--device={device} cannot be used here: use cuda, mps or cpu, if PyTorch finds it")
    if size > 1:
        gpu = world.device if world.device.type == "cuda" else None
        # torch 2.13 has another name for this option of DDP, which 2.11 does not know
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        with explain(launch, ValueError, RuntimeError):
            store, _, _ = next(dist.rendezvous("env://"))  # where the processes find each other
            if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
                # after a restart by torchrun it still has old addresses (PyTorch's issue 135712)
                store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank,
                                    world_size=size, device_id=gpu)
    torch.manual_seed(seed)
    return world


def configure_compiler():
    """Set what torch.compile needs for every script."""
    # a block is compiled anew for training, for validation and for each length in HellaSwag
    torch._dynamo.config.recompile_limit = 64
    # otherwise the graph is split at each DDP bucket, which prevents fusion
    torch._dynamo.config.optimize_ddp = False
    # run the backward pass of fp32 regions in fp32, as eager mode does
    torch._functorch.config.backward_pass_autocast = "off"
    # this way to fuse sums has given wrong gradients since PyTorch 2.10 (its issue 193061)
    torch._inductor.config.triton.mix_order_reduction = False


def accumulation_steps(cfg, world):
    """Return how many micro-batches a process accumulates for a step of total_batch_size tokens."""
    rows, rest = divmod(cfg.total_batch_size, cfg.block_size * world.size)
    if rest == 0 and rows % cfg.batch_size == 0:
        return rows // cfg.batch_size
    hint = f"use a --batch_size that divides it: {[b for b in range(1, 513) if rows % b == 0]}"
    if rest:
        hint = "no --batch_size does: change --total_batch_size, --block_size or the processes"
    fail(f"--total_batch_size={cfg.total_batch_size} is no multiple of {world.size} processes x "
         f"--batch_size={cfg.batch_size} x --block_size={cfg.block_size}; {hint}")


# dense bf16 peak in FLOP/s (NVIDIA's data sheets); the first name within the device's name is used
PEAK_FLOPS = {
    "A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989.4e12, "H200 NVL": 835e12,
    "H200": 989.4e12, "GH200": 989.4e12, "B200": 2250e12, "RTX 3090": 71e12, "RTX 4090": 165.2e12}


def peak_flops(device_name):
    """Return a GPU's bf16 peak in FLOP/s, or None. Only whole words count: A1000 is not A100."""
    if not re.search(r"\b(Laptop|Ti|D|MIG)\b", device_name):
        for name, peak in PEAK_FLOPS.items():
            if re.search(rf"\b{name}\b", device_name):
                return peak


# ---- data ----------------------------------------------------------------------------------------

class ShardLoader:
    """Batches of the shards of one split, which in name order are one endless sequence of tokens.

    Step s trains on tokens [s * total_batch_size, (s + 1) * total_batch_size); rank and micro-step
    are offsets into them. So the data of a step depend neither on the number of processes nor on
    when the run was resumed. After its last token the sequence starts again. Rows are cut without
    regard to documents, as for GPT-3 (its paper, appendix B): attention crosses their borders."""

    def __init__(self, cfg, split, world, tokenizer=None, synthetic=False):
        """split: "train" or "val". tokenizer: which says how many bytes a token has, or None.
        synthetic: take random tokens instead of shards, for --bench."""
        self.B, self.T = cfg.batch_size, cfg.block_size
        self.total_batch_size = cfg.total_batch_size
        self.world = world
        if synthetic:
            rng = np.random.default_rng(0)
            shard = rng.integers(0, min(GPT2_TOKENS, cfg.vocab_size), 2**20, np.uint16)
            self.tokens = TokenSequence(["random tokens"], [shard], cfg.vocab_size)
        else:
            if cfg.tiny and cfg.data_dir == TINY_TRAINING["data_dir"]:
                world.local_first(lambda: write_builtin_text(cfg.data_dir))
            known = min(cfg.vocab_size, n_tokens(vocab_of(cfg.data_dir)))
            self.tokens = open_shards(cfg.data_dir, split, known)
            world.check_same(f"the {split} shards in {cfg.data_dir}", len(self.tokens))
        if len(self.tokens) <= self.T:
            fail(f"the {split} shards in {cfg.data_dir} hold {len(self.tokens)} tokens: a row of "
                 f"--block_size={self.T} and its last target need more")
        for name in ("val_tokens", "val_full_tokens") if split == "val" else ():
            if 0 < getattr(cfg, name) < self.T:
                fail(f"--{name}={getattr(cfg, name)} is less than a row of --block_size={self.T}")
        if world.rank == 0 and not synthetic:
            self.warn(cfg, split)
        if split == "val" and not synthetic:
            self.measure(cfg, tokenizer)

    def measure(self, cfg, tokenizer):
        """Set val_tokens, how many targets to evaluate on; token_bytes, how many bytes each token
        stands for, int64 (vocab_size,); and what run.json says of the text."""
        token_bytes = np.zeros(cfg.vocab_size, np.int64)
        self.val_tokens, self.val_text, self.bytes_per_token = cfg.val_tokens, None, None
        self.world.check_same("whether they have a tokenizer", tokenizer is None)
        if tokenizer:
            token_bytes[:tokenizer.n_vocab] = token_lengths(tokenizer)
        elif cfg.val_bytes:
            fail(f"--val_bytes={cfg.val_bytes} needs a known vocabulary, to count bytes")
        if cfg.val_bytes:
            self.val_tokens, text = self.tokens.first_bytes(cfg.val_bytes, tokenizer)
            self.val_text = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
            if len(text) < cfg.val_bytes and self.world.rank == 0:
                print(f"{cfg.data_dir} has only {len(text):,} bytes to validate on")
        if tokenizer:
            ids = self.tokens.read(0, min(self.val_tokens, len(self.tokens)))
            self.bytes_per_token = round(token_bytes[ids].mean(), 4)
        self.token_bytes = torch.from_numpy(token_bytes).to(self.world.device)

    def warn(self, cfg, split):
        """Say what about the data one may not expect."""
        n = len(self.tokens)
        if split == "train" and n // cfg.total_batch_size < cfg.max_steps:
            steps = n // cfg.total_batch_size
            print(f"{cfg.data_dir} has {n:,} tokens: they repeat after step {steps}")
        if split == "val" and n < max(0 if cfg.val_bytes else cfg.val_tokens, cfg.val_full_tokens):
            print(f"{cfg.data_dir} has {n:,} validation tokens, fewer than asked for")
        if gaps := missing_shards(self.tokens.paths):
            print(f"{cfg.data_dir} lacks {split} shard {gaps}: a run with it sees other data in "
                  "the same steps", file=sys.stderr)

    def load(self, start, n):
        """Read n tokens and the last target, in a thread; int16, as torch lacks uint16."""
        tokens = torch.from_numpy(self.tokens.read(start, n + 1).view(np.int16))
        if self.world.device.type != "cuda":
            return tokens
        torch.cuda.set_device(self.world.device)  # else the thread would use GPU 0
        return tokens.pin_memory()

    def batch(self, loading):
        """Return x and y, int64 (B, T) on the device. What is missing in the last batch of an
        evaluation is padding with targets of -1. loading: the future of self.load."""
        # the transfer takes 2 bytes per token; & 0xFFFF makes the uint16 again that it was
        pinned = self.world.device.type == "cuda"  # other memory may be reused before it is copied
        tokens = loading.result().to(self.world.device, non_blocking=pinned).long() & 0xFFFF
        padding = (0, self.B * self.T - (len(tokens) - 1))
        x, y = F.pad(tokens[:-1], padding), F.pad(tokens[1:], padding, value=-1)
        return x.view(self.B, self.T), y.view(self.B, self.T)

    def batches(self, places):
        """Yield a batch for each (start, n) of places. A thread reads the next one meanwhile."""
        with ThreadPoolExecutor(1) as pool:
            ahead = None
            for start, n in places:
                current, ahead = ahead, pool.submit(self.load, start, n)
                if current:
                    yield self.batch(current)
            if ahead:
                yield self.batch(ahead)

    def train_batches(self, start_step, micro_steps):
        """Yield this rank's micro-batches without end, from the first of start_step on."""
        tokens, rank, size = self.B * self.T, self.world.rank, self.world.size
        return self.batches(
            (step * self.total_batch_size + (micro_step * size + rank) * tokens, tokens)
            for step in itertools.count(start_step) for micro_step in range(micro_steps))

    def loss_table(self, n_tokens):
        """Return zeros, float32 (rows, 4), for what row_losses returns of val_batches."""
        batches = math.ceil(min(n_tokens, len(self.tokens) - 1) / (self.B * self.T))
        return torch.zeros(batches * self.B, 4, device=self.world.device)

    def val_batches(self, n_tokens):
        """Yield this rank's batches of the first n_tokens, the same tokens whatever the batch size,
        as (rows, x, y). rows: the slice of the batch's rows among all."""
        size = self.B * self.T
        n = min(n_tokens, len(self.tokens) - 1)
        starts = range(self.world.rank * size, n, self.world.size * size)
        batches = self.batches((start, min(size, n - start)) for start in starts)
        for start, (x, y) in zip(starts, batches):
            yield slice(start // self.T, start // self.T + self.B), x, y


# ---- evaluation ----------------------------------------------------------------------------------

def token_losses(model, hidden, targets):
    """Return the cross-entropy of each target in nats, 0 where the target is -1.
    hidden: (N, C), what model.hidden returns. targets: int64 (N,). Returns float32 (N,)."""
    # the logits of 128 targets, 26 MB in fp32, fit a CPU's cache
    chunk = 128 if hidden.device.type == "cpu" else 8192
    return torch.cat([
        F.cross_entropy(model.lm_head(h).float(), t, ignore_index=-1, reduction="none")
        for h, t in zip(hidden.split(chunk), targets.split(chunk))])


def row_losses(model, x, y, token_bytes):
    """Return float32 (B, 4): of each row the nats and the number of its targets, then the nats and
    bytes of those that are text: <|endoftext|> stands for 0 bytes. x, y, token_bytes: of a
    ShardLoader.

    Bits per byte (nats / ln 2 / bytes) compare between vocabularies (The Pile, section 3.1)."""
    targets = y.flatten()
    losses = token_losses(model, model.hidden(x).flatten(0, 1), targets)
    counts = targets >= 0
    lengths = token_bytes[targets.clamp(min=0)] * counts
    table = torch.stack([losses, counts, losses * (lengths > 0), lengths])
    return table.view(4, *y.shape).sum(2).T


# ---- optimisation --------------------------------------------------------------------------------

def cosine_lr(cfg, step):
    """Return the learning rate of update `step`: linear warm-up, then a cosine that reaches
    min_lr_ratio x the peak at max_steps (GPT-3 paper, appendix B)."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    progress = min(1.0, (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.learning_rate * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * cosine)


def generate(model, tokenizer, prompt, device, seed, new_tokens=100, temperature=0.8, top_k=50):
    """Continue a prompt (list of tokens) by sampling among the top_k tokens; return prompt and
    continuation as text. At temperature 0 the likeliest token comes next. The padding of the
    vocabulary is never drawn."""
    ids = prompt or [tokenizer.eot_token]
    block_size = model.cfg.block_size
    recurrent = hasattr(model, "new_state")
    if len(ids) > block_size and not recurrent:
        fail(f"the prompt has {len(ids)} tokens, the context of this model {block_size}")
    state = model.new_state(1) if recurrent else None
    unread = ids  # the state holds what has been read
    rng = torch.Generator().manual_seed(seed)
    # each step has another length, for which a compiled model would be compiled again
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for _ in range(new_tokens):
            idx = torch.tensor([unread if recurrent else ids[-block_size:]], device=device)
            hidden = model.hidden(idx, state) if recurrent else model.hidden(idx)
            logits = model.lm_head(hidden[:, -1]).float().cpu()[0, :tokenizer.n_vocab]
            values, tokens = logits.topk(min(top_k if temperature else 1, len(logits)))
            probabilities = ((values - values[0]) / (temperature or 1.0)).softmax(-1)
            unread = [tokens[torch.multinomial(probabilities, 1, generator=rng)].item()]
            ids = ids + unread
    return tokenizer.decode(ids)
