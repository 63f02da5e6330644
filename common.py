"""
Plumbing that every train_<arch>.py shares: options, process group, data loader, cosine schedule, HellaSwag scorer, log,
checkpoints, and the modes --tiny, --sample, --export and --bench. Nothing here knows what a layer is: a model is seen as
    model(idx, targets) -> (logits, loss)        model.num_params() -> {"total", "active", "non_embedding"}
    model.hidden(idx) -> (B, T, C)               model.flops_per_token() -> int
    model.lm_head(hidden) -> logits              model.configure_optimizers(cfg, device_type) -> optimizer
and may offer model.streams() -> {name: scalar tensor}, further streams of the log with a value for each update, and
model.new_state(batch_size), which model.hidden(idx, state) then takes to go on from what it has read.
"""
import argparse
import contextlib
import difflib
import glob
import inspect
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import fineweb
import hellaswag

PROMPT = "Hello, I'm a language model,"
BENCH_WARMUP = 5  # steps that --bench does not count: compilation, first allocations
# dense bf16 peak in FLOP/s, NVIDIA's data sheets; the first name that is part of the device's name counts
PEAK_FLOPS = {"A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989.4e12, "GH200": 989.4e12, "H200": 989.4e12,
              "B200": 2250e12, "RTX 3090": 71e12, "RTX 4090": 165.2e12}
# --tiny: about a minute on two CPU cores; each script adds the size of its model
TINY_TRAINING = dict(total_batch_size=1024, batch_size=16, max_steps=600, warmup_steps=40, learning_rate=3e-3,
                     eval_interval=150, val_tokens=32768, hella_limit=0, checkpoint_interval=300, sample_interval=600,
                     data_dir="tiny_data", compile=False)


# ---- errors and options ----------------------------------------------------------------------------------------------

def fail(message):
    """Bad input ends here: one line on stderr, exit code 1."""
    sys.exit("error: " + " ".join(str(message).split())[:500])


@contextlib.contextmanager
def one_line_errors():
    """Full disks, forbidden folders and exhausted memory end in one line; a decorator or the head of a with statement."""
    try:
        yield
    except OSError as e:
        fail(e)
    except RuntimeError as e:  # torch.OutOfMemoryError is one; the CPU's allocator has no class of its own
        if not isinstance(e, torch.OutOfMemoryError) and "can't allocate memory" not in str(e):
            raise
        fail("out of memory: lower --batch_size (the result is the same: more micro-steps make up for it)")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (--help lists the options)")


def boolean(text):
    if text.lower() not in ("0", "false", "no", "1", "true", "yes"):
        raise ValueError
    return text.lower() in ("1", "true", "yes")


def parse_args(Config, tiny):
    """Command line -> (cfg, mode). Every field of the dataclass Config is an option, typed by the field and explained by
    the comment beside it; mode has `sample` and `export` (str or None) and `bench` (int, 0 is off)."""
    comments = dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(Config), re.M))
    parser = Parser(allow_abbrev=False, description=sys.modules[Config.__module__].__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        kind = dict(type=boolean, nargs="?", const=True) if f.type is bool else dict(type=f.type)
        text = f"{comments[f.name]} (default: {f.default})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", metavar=f.type.__name__, help=text, **kind)
    parser.add_argument("--sample", metavar="TEXT", help="continue TEXT with the newest checkpoint, or with --resume=FILE")
    parser.add_argument("--export", metavar="DIR", help="write that checkpoint as a Hugging Face folder")
    parser.add_argument("--bench", metavar="N", type=int, default=0, help="time N steps on random tokens, keep nothing")
    mode, unknown = parser.parse_known_args()
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, 1)
        parser.error(f"unknown option {unknown[0]}" + (f", did you mean {near[0]}?" if near else ""))
    given = {f.name: getattr(mode, f.name) for f in fields(Config) if getattr(mode, f.name) is not None}
    if given.get("tiny"):
        given = {**TINY_TRAINING, **tiny, **given}
    if (mode.sample is not None) + (mode.export is not None) + (mode.bench > 0) > 1:
        fail("--sample, --export and --bench: one at a time")
    if mode.bench:
        given |= dict(max_steps=mode.bench + BENCH_WARMUP, eval_interval=0, hella_limit=0, sample_interval=0)
    counts = ("max_steps", "warmup_steps", "seed", "eval_interval", "hella_limit", "checkpoint_interval", "sample_interval",
              "keep_checkpoints", "bench", "n_dense_layer")  # 0 makes sense
    for name, value in {**given, "bench": mode.bench}.items():
        least = 0 if isinstance(value, float) or name in counts else 1
        below = 1 if name.startswith("beta") else math.inf if isinstance(value, float) else 2**63 if name == "seed" else 2**40
        if type(value) in (int, float) and not least <= value < below:
            fail(f"--{name}={value} is out of range: at least {least}, less than {below}")
    if given.get("optimizer", "adamw") not in ("adamw", "muon"):
        fail(f"--optimizer={given['optimizer']}: adamw or muon")
    try:
        return Config(**given), mode
    except ValueError as e:
        fail(e)


# ---- processes and devices -------------------------------------------------------------------------------------------

@dataclass
class World:
    """The processes of this run and the device of this one."""
    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def sum(self, x):
        """All-reduce in place. Sums only: gloo has no average."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def local_first(self, work):
        """work() writes files: one process of each machine does it while the others wait, and the machines in turn, since
        they may share the disk."""
        for rank in range(self.size):
            if rank == self.rank and self.local_rank == 0:
                work()
            if self.size > 1:
                dist.barrier()


def default_device():
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def init_world(cfg):
    """Join the process group if torchrun started this process, choose the device, and seed."""
    rank, size, local_rank = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    sys.stdout.reconfigure(errors="replace")  # samples may hold what the terminal cannot show
    try:
        world = World(torch.device(cfg.device), rank, size, local_rank)
        if world.device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError
        if world.device.type == "cuda":
            world.device = torch.device("cuda", local_rank if size > 1 else world.device.index or 0)
            torch.cuda.set_device(world.device)
            torch.set_float32_matmul_precision("high")
        torch.empty(1, device=world.device)
    except (RuntimeError, AssertionError, AttributeError):  # each backend that is not there has its own
        fail(f"--device={cfg.device} cannot be used here: cuda, mps or cpu, as far as PyTorch finds them")
    if size > 1:
        cuda = world.device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", device_id=world.device if cuda else None)
    torch.manual_seed(cfg.seed)
    return world


def accumulation_steps(cfg, world):
    """Micro-steps a step: a step is total_batch_size tokens whatever the number of processes."""
    rows, rest = divmod(cfg.total_batch_size, cfg.block_size * world.size)
    if rest or rows % cfg.batch_size:
        fit = [b for b in range(1, min(rows, 512) + 1) if rows % b == 0]
        fail(f"--total_batch_size={cfg.total_batch_size} does not divide into {world.size} processes x --batch_size="
             f"{cfg.batch_size} x --block_size={cfg.block_size}; " + (
                 "no --batch_size does: change the number of processes, --block_size or --total_batch_size" if rest else
                 f"values of --batch_size that do: {fit}"))
    return rows // cfg.batch_size


# ---- data ------------------------------------------------------------------------------------------------------------

def write_tiny(folder):
    """Byte-level shards of text that every Python carries, the reference manual in pydoc_data; byte 0 in front of each
    document."""
    from pydoc_data.topics import topics
    data = np.frombuffer("".join("\0" + text for text in topics.values()).encode(), np.uint8)
    n = len(data) // 10
    os.makedirs(folder, exist_ok=True)
    for name, part in ("tiny_val_000000.bin", data[:n]), ("tiny_train_000001.bin", data[n:]):
        if not os.path.exists(path := os.path.join(folder, name)):
            fineweb.write_shard(path, part)


class DataLoader:
    """The shards of one split, in name order, as one endless stream of tokens.

    Step s reads tokens [s * total_batch_size, (s + 1) * total_batch_size), its targets are one later; rank and micro-step
    are offsets into that. So the data of a step depends neither on the number of processes nor on when the run was resumed.
    Past its end the stream starts again. Rows are cut without regard to documents, as for GPT-3 (its paper,
    appendix B): attention may reach into the document before.
    """

    def __init__(self, cfg, split, world, synthetic=False):
        self.B, self.T, self.vocab_size, self.world = cfg.batch_size, cfg.block_size, cfg.vocab_size, world
        self.total_batch_size = cfg.total_batch_size
        if synthetic:
            self.shards = [np.random.default_rng(0).integers(0, min(50257, cfg.vocab_size), 2**20, np.uint16)]
        else:
            if cfg.tiny and cfg.data_dir == TINY_TRAINING["data_dir"]:
                world.local_first(lambda: write_tiny(cfg.data_dir))
            self.paths = sorted(glob.glob(os.path.join(glob.escape(cfg.data_dir), f"*_{split}_*.bin")))
            if not self.paths:
                fail(f"no {split} shards (*_{split}_*.bin) in {cfg.data_dir}: make them with fineweb.py or say --data_dir=DIR")
            self.shards = [self.open(path) for path in self.paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.n_tokens = int(self.ends[-1])
        if self.n_tokens <= self.T:
            fail(f"the {split} shards in {cfg.data_dir} hold {self.n_tokens} tokens: less than a row of --block_size={self.T}")
        self.val_rows = min(cfg.val_tokens, self.n_tokens - 1) // self.T  # whole rows of the first val_tokens tokens
        if split == "val" and not self.val_rows:
            fail(f"--val_tokens={cfg.val_tokens} is less than a row of --block_size={self.T}")
        steps = self.n_tokens // cfg.total_batch_size
        if split == "train" and steps < cfg.max_steps and world.rank == 0 and not synthetic:
            print(f"{cfg.data_dir} has {self.n_tokens:,} tokens: after {steps} steps they come again")

    def open(self, path):
        try:
            return fineweb.open_shard(path)
        except (OSError, ValueError) as e:
            fail(f"{path}: {e}")

    def read(self, start, n):
        """Tokens [start, start + n) of the stream, uint16."""
        out, filled = np.empty(n, np.uint16), 0
        while filled < n:
            position = (start + filled) % self.n_tokens
            i = int(np.searchsorted(self.ends, position, side="right"))
            piece = self.shards[i][position - self.ends[i]:][:n - filled]  # a negative index: from the shard's end
            if piece.max() >= self.vocab_size:
                fail(f"{self.paths[i]} holds token {piece.max()}, beyond --vocab_size={self.vocab_size}")
            out[filled:filled + len(piece)] = piece
            filled += len(piece)
        return out

    def stream(self, jobs):
        """(start, rows) pairs -> (x, y, rows), x and y int64 (B, T) on the device; targets past `rows` rows are -1. A thread
        reads the next micro-batch while the device works on this one."""
        def load(start, rows):
            tokens = torch.from_numpy(self.read(start, rows * self.T + 1).view(np.int16))
            if self.world.device.type != "cuda":
                return tokens
            torch.cuda.set_device(self.world.device)  # each thread has its own: GPU 0 else, where pinning leaves a context
            return tokens.pin_memory()

        def batch(future, rows):
            tokens = future.result().to(self.world.device, non_blocking=True).long() & 0xFFFF  # widened there, not here
            pad = (0, (self.B - rows) * self.T)
            return F.pad(tokens[:-1], pad).view(self.B, self.T), F.pad(tokens[1:], pad, value=-1).view(self.B, self.T), rows

        with ThreadPoolExecutor(1) as pool:
            ahead = deque()
            for start, rows in jobs:
                ahead.append((pool.submit(load, start, rows), rows))
                if len(ahead) > 1:
                    yield batch(*ahead.popleft())
            for item in ahead:
                yield batch(*item)

    def train_batches(self, start_step, micro_steps):
        """This rank's endless micro-batches from the first of start_step on."""
        n, rank, size = self.B * self.T, self.world.rank, self.world.size
        return self.stream((step * self.total_batch_size + (micro * size + rank) * n, self.B)
                           for step in itertools.count(start_step) for micro in range(micro_steps))

    def val_batches(self):
        """This rank's share of the val_rows rows: the same tokens whatever the batch size."""
        rank, size = self.world.rank, self.world.size
        return self.stream((row * self.T, min(self.B, self.val_rows - row))
                           for row in range(rank * self.B, self.val_rows, size * self.B))


# ---- optimisation ----------------------------------------------------------------------------------------------------

def cosine_lr(cfg, step):
    """Learning rate of update `step`: linear warm-up, then a cosine that reaches min_lr_ratio x the peak at max_steps
    (GPT-3 paper, appendix B)."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    progress = min(1.0, (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps))
    return cfg.learning_rate * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


class Optimizers(list):
    """Several optimizers that look like one: Muon for matrices, AdamW for the rest."""

    @property
    def param_groups(self):
        return [group for optimizer in self for group in optimizer.param_groups]

    def step(self):
        for optimizer in self:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self:
            optimizer.zero_grad()

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self]

    def load_state_dict(self, states):
        for optimizer, state in zip(self, states, strict=True):
            optimizer.load_state_dict(state)


# ---- text ------------------------------------------------------------------------------------------------------------

class Bytes:
    """The tokenizer of vocabularies that are too small for GPT-2's."""
    n_vocab, eot_token = 256, 0

    def encode_ordinary(self, text):
        return list(text.encode(errors="replace"))

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def get_tokenizer(vocab_size):
    """GPT-2's BPE from 50,257 tokens on, else bytes. None when the BPE can be neither found nor downloaded."""
    try:
        return tiktoken.get_encoding("gpt2") if vocab_size >= 50257 else Bytes()
    except OSError as e:
        print(f"no tokenizer, so no text: GPT-2's BPE cannot be downloaded ({type(e).__name__}); where it was once, set "
              "TIKTOKEN_CACHE_DIR", file=sys.stderr)


def generate(model, tokenizer, prompt, block_size, device, seed, new_tokens=100, top_k=50):
    """Continue prompt (str) by sampling among the top_k tokens. The vocabulary's padding is never drawn."""
    ids = tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]
    state = [model.new_state(1)] if hasattr(model, "new_state") else []  # a recurrent model reads each token once
    if len(ids) > block_size and not state:
        fail(f"the prompt has {len(ids)} tokens, the context of this model {block_size}")
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for i in range(new_tokens):
            window = ids[-block_size:] if not state else ids[-1:] if i else ids
            hidden = model.hidden(torch.tensor([window], device=device), *state)
            logits = model.lm_head(hidden[:, -1]).float().cpu()[0, :tokenizer.n_vocab]
            values, choices = logits.topk(min(top_k, len(logits)))
            ids.append(choices[torch.multinomial(values.softmax(-1), 1, generator=rng)].item())
    return tokenizer.decode(ids)


def load_hellaswag(cfg, world, tokenizer, style="completion"):
    """The scorer for this run. None, said once, without file and network; a file that was asked for must be there."""
    def fetch():
        try:
            hellaswag.fetch()
        except OSError as e:
            print(f"no HellaSwag in this run: {e}; put {hellaswag.FILE} here, or say --hellaswag_file=FILE", file=sys.stderr)

    if not cfg.hella_limit or tokenizer is None or cfg.block_size < 2:
        return None
    if cfg.hellaswag_file == hellaswag.FILE:
        world.local_first(fetch)
        if not os.path.exists(hellaswag.FILE):
            return None
    try:
        items = hellaswag.load(cfg.hellaswag_file, style)[:cfg.hella_limit]
    except (OSError, ValueError) as e:
        fail(e)
    batch_tokens = cfg.batch_size * cfg.block_size
    return hellaswag.HellaSwag(items, tokenizer, cfg.block_size, batch_tokens, world, cfg.compile, style)


# ---- checkpoints -----------------------------------------------------------------------------------------------------

def read_checkpoint(path):
    """The dict that Run.save wrote, tensors on the CPU. Raises ValueError with a one-line reason; never runs code."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        kinds = {"arch": str, "step": int, "config": dict, "model": dict, "optimizer": (dict, list)}
        if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(k), t) for k, t in kinds.items()):
            raise ValueError("entries are missing or of another kind")
        return checkpoint
    except Exception as e:  # a damaged file can raise anything in torch.load
        if isinstance(e, pickle.UnpicklingError):
            e = "damaged, or not plain data: it may carry code, which was not run"
        raise ValueError(f"{path} is not a readable checkpoint: {str(e) or 'it is empty'}") from None


def checkpoints(folder):
    """{step: path} of the checkpoints in a folder, the newest first."""
    found = {int(m[1]): path for path in glob.glob(os.path.join(glob.escape(folder), "model_*.pt"))
             if (m := re.fullmatch(r"model_(\d{5,})\.pt", os.path.basename(path))) and os.path.isfile(path)}
    return dict(sorted(found.items(), reverse=True))


def find_checkpoint(cfg):
    """(path, checkpoint) that --resume names: a file, or with "auto" the newest readable one in log_dir, or (None, None)."""
    passed_over = []
    for path in checkpoints(cfg.log_dir).values() if cfg.resume in ("", "auto") else [cfg.resume]:
        try:
            checkpoint = read_checkpoint(path)
        except ValueError as e:
            passed_over.append(e)
            continue
        for e in passed_over:
            print(f"passed over: {e}", file=sys.stderr)
        return path, checkpoint
    if passed_over:
        fail(passed_over[0])
    return None, None


def load_weights(model, arch, path, checkpoint):
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as e:
        fail(f"{path} does not fit train_{arch}.py: {e}")
    return model


def check_arch(arch, path, checkpoint):
    if checkpoint["arch"] != arch:
        fail(f"{path} holds a {checkpoint['arch']} model, not {arch}: use train_{checkpoint['arch']}.py")


def load_model(path, checkpoint, arch, Config, Model):
    """The model of a checkpoint, in the shape it was trained in; its configuration is model.cfg."""
    check_arch(arch, path, checkpoint)
    try:
        model = Model(Config(**checkpoint["config"]))
    except (TypeError, ValueError) as e:
        fail(f"{path} has a configuration that train_{arch}.py does not know: {e}")
    return load_weights(model, arch, path, checkpoint).eval()


def use_checkpoint(cfg, mode, arch, Config, Model, to_hf):
    """--sample and --export."""
    path, checkpoint = find_checkpoint(cfg)
    if path is None:
        fail(f"no checkpoint in {cfg.log_dir}: train first, or say --resume=FILE or --log_dir=DIR")
    model = load_model(path, checkpoint, arch, Config, Model)
    if mode.sample is not None:
        device = init_world(cfg).device
        if tokenizer := get_tokenizer(model.cfg.vocab_size):
            print(generate(model.to(device), tokenizer, mode.sample, model.cfg.block_size, device, cfg.seed))
    if mode.export is not None:
        if os.path.exists(mode.export) and os.listdir(mode.export):
            fail(f"--export={mode.export}: this folder is not empty")
        try:
            exported = to_hf(model.cpu())
        except ImportError:
            fail("--export needs transformers: pip install transformers")
        try:
            if isinstance(exported, dict):
                os.makedirs(mode.export, exist_ok=True)
                torch.save(exported, os.path.join(mode.export, "model.pth"))
            else:
                exported.save_pretrained(mode.export)
        except Exception as e:  # torch.save and safetensors each wrap the OSError of a full disk
            shutil.rmtree(mode.export, ignore_errors=True)
            fail(f"cannot write {mode.export}: {e}")
        print(f"wrote {path}, step {checkpoint['step']}, to {mode.export}")


# ---- the run: log, console, checkpoints ------------------------------------------------------------------------------

class Run:
    """One training run in its folder log_dir: log.txt, run.json, model_*.pt, hella_*.npy, and what the console shows.

    A line of log.txt is `step stream value`; step counts the updates made so far. Nothing in it depends on time, so a run
    that was interrupted and resumed ends with the bytes of one that was not.
    """

    def __init__(self, cfg, arch, world, model, optimizer, bench):
        """Take up the checkpoint that --resume names, if any; self.start_step is where to begin. A benchmark keeps nothing."""
        self.cfg, self.arch, self.world, self.model, self.optimizer, self.bench = cfg, arch, world, model, optimizer, bench
        self.pending, self.seconds, self.interrupted, self.stopping = deque(), [], False, False
        self.start_step, self.saved, self.file, self.info, self.tokens_per_second = 0, None, None, None, None
        self.log_path, params = os.path.join(cfg.log_dir, "log.txt"), model.num_params()
        self.flops = model.flops_per_token()
        self.device_name = torch.cuda.get_device_name() if world.device.type == "cuda" else world.device.type
        if cfg.resume and not bench:
            self.resume()
            start = torch.tensor(float(self.start_step), device=world.device)
            if world.sum(start.clone()) != start * world.size:
                fail(f"the processes find different checkpoints: --log_dir={cfg.log_dir} must be a folder that all of them share")
        if world.rank == 0 and not bench:
            self.open_log(params)
        for signum in signal.SIGINT, signal.SIGTERM:
            signal.signal(signum, self.interrupt)
        parts = "".join(f", {n:,} {k}" for k, n in params.items() if k not in ("total", "non_embedding") and n != params["total"])
        self.say(f"{arch}: {params['total']:,} parameters{parts}, {self.flops / 1e6:.1f} MFLOP a token, {world.size} x "
                 f"{self.device_name}")
        self.bar = tqdm(initial=self.start_step, total=cfg.max_steps, unit="step", dynamic_ncols=True,
                        disable=world.rank > 0 or not sys.stdout.isatty())
        self.clock = time.perf_counter()

    def resume(self):
        cfg, (path, checkpoint) = self.cfg, find_checkpoint(self.cfg)
        if path is None:
            return self.say(f"no checkpoint in {cfg.log_dir}: beginning at step 0")
        check_arch(self.arch, path, checkpoint)
        names, saved, now = [f.name for f in fields(cfg)], checkpoint["config"], asdict(self.model.cfg)
        differ = [n for n in names if saved.get(n) != now[n] and n != "resume"]
        fixed = [n for n in differ if n in names[:names.index("total_batch_size")] or n == "optimizer"]
        if fixed:
            wanted = " ".join(f"--{n}={saved.get(n)}" for n in fixed)
            fail(f"{path} has another shape or optimizer; to go on with it say {wanted}")
        load_weights(self.model, self.arch, path, checkpoint)
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            fail(f"{path} holds no state of this optimizer: {e}")
        for group, given in zip(self.optimizer.param_groups, options):
            group.update(given)  # decay and betas of this command line, not of the checkpoint's
        self.start_step, self.saved, self.tokens_per_second = checkpoint["step"], path, checkpoint.get("tokens_per_second")
        if not 0 <= self.start_step <= cfg.max_steps:
            fail(f"{path} is at step {self.start_step}, beyond --max_steps={cfg.max_steps}")
        if cfg.resume != "auto" and any(step > self.start_step for step in checkpoints(cfg.log_dir)):
            fail(f"{cfg.log_dir} holds later checkpoints than {path}: move them away, or choose another --log_dir")
        if os.path.exists(self.log_path) and not os.path.samefile(os.path.dirname(os.path.abspath(path)), cfg.log_dir):
            fail(f"{cfg.log_dir} holds the log of another run than {path}: choose another --log_dir")
        self.say(f"resumed {path} at step {self.start_step}" + "".join(f", {n} {saved.get(n)} -> {now[n]}" for n in differ))

    def open_log(self, params):
        """Drop what an earlier process logged from start_step on (and a torn last line); describe the run in run.json."""
        cfg, lines = self.cfg, []
        if os.path.exists(self.log_path):
            with open(self.log_path, errors="replace", newline="\n") as f:
                lines = [(int(m[1]), line) for line in f if (m := re.fullmatch(r"(\d+) \w+ \S+\n", line))]
        last = max((step for step, line in lines if " train " in line), default=-1)
        if not cfg.resume and (checkpoints(cfg.log_dir) or last >= 0):
            fail(f"{cfg.log_dir} holds a run: go on with the same command and --resume=auto, or choose another --log_dir")
        if not self.saved and last >= cfg.checkpoint_interval > 0:
            fail(f"{cfg.log_dir} holds a log up to step {last} and no checkpoint: put one back, or choose another --log_dir")
        kept = [line for step, line in lines if step < self.start_step]
        here = shlex.quote(os.path.dirname(os.path.abspath(__file__)))
        commit = subprocess.getoutput(f"git -C {here} rev-parse HEAD 2>/dev/null")
        self.info = {"arch": self.arch, "config": asdict(cfg), "params": params, "flops_per_token": self.flops, "git_commit": commit,
                "device": self.device_name, "processes": self.world.size, "torch": torch.__version__,
                "python": sys.version.split()[0], "command": sys.argv}
        self.write("log.txt", lambda f: f.write("".join(kept).encode()))
        self.write_info()
        self.file = open(self.log_path, "a", buffering=1)

    def write_info(self):
        """run.json; tokens_per_second is that of the median step, without evaluations."""
        info = {**self.info, "tokens_per_second": self.tokens_per_second}
        self.write("run.json", lambda f: f.write(json.dumps(info, indent=1).encode()))

    def write(self, name, write):
        """A file of this run, whole or not at all: what was there before survives a full disk and a kill -9."""
        path = os.path.join(self.cfg.log_dir, name)
        try:
            os.makedirs(self.cfg.log_dir, exist_ok=True)
            with fineweb.replacing(path) as f:
                write(f)
        except (OSError, RuntimeError) as e:  # torch.save wraps the OSError of a full disk
            fail(f"cannot write {path}: {e}; what was there before is untouched")
        return path

    def interrupt(self, signum, frame):
        self.interrupted = True  # finish the step, save, leave
        if signum == signal.SIGINT:  # a second Ctrl-C ends the process at once; SIGTERM often comes twice by itself
            signal.signal(signum, signal.SIG_DFL)

    def say(self, text):
        if self.world.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()

    def log(self, step, stream, value):
        if self.file:
            self.file.write(f"{step} {stream} {value}\n")

    def train(self, step, loss, norm, lr):
        """Report update `step`. Its numbers are read while the next step runs, so that the device never waits."""
        more = self.model.streams() if hasattr(self.model, "streams") else {}
        stats = torch.stack([loss, norm, torch.full_like(loss, self.interrupted), *more.values()]) / self.world.size
        cuda = self.world.device.type == "cuda"
        stats = self.world.sum(stats).to("cpu", non_blocking=cuda)
        copied = torch.cuda.Event() if cuda else None
        if cuda:
            copied.record()
        self.pending.append((step, lr, list(more), stats, copied))
        if len(self.pending) > cuda:
            self.read()

    def read(self):
        step, lr, names, stats, copied = self.pending.popleft()
        if copied:
            copied.synchronize()
        loss, norm, interrupted, *more = stats.tolist()
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        if not math.isfinite(loss + norm):
            fail(f"step {step}: the loss is {loss}, the gradient norm {norm}. Nothing of this was saved: go on from "
                 f"{self.saved or 'the start'} with a lower --learning_rate or a longer --warmup_steps")
        self.stopping = interrupted > 0  # whichever process was told to stop, all stop at the same step
        self.seconds.append(seconds)
        streams = {"train": f"{loss:.6f}", "lr": f"{lr:.4e}", "norm": f"{norm:.4f}"}
        streams |= {name: f"{value:.4f}" for name, value in zip(names, more)}
        for stream, value in streams.items():
            self.log(step, stream, value)
        text = " | ".join(f"{'loss' if k == 'train' else k} {v}" for k, v in streams.items())
        self.say(f"step {step:5d}/{self.cfg.max_steps} | {text} | {self.speed(seconds)}")
        self.bar.update()

    def flush(self):
        """Read what is pending: nothing is evaluated or saved after a bad update."""
        while self.pending:
            self.read()

    def speed(self, seconds):
        """Milliseconds, tokens/s, MFU and peak memory. MFU (PaLM paper, appendix B): flops_per_token x tokens/s over the
        device's dense bf16 peak, flops_per_token = 6 N + 12 L d T with N the parameters that enter matrix products."""
        rate, peak = self.cfg.total_batch_size / seconds, [v for k, v in PEAK_FLOPS.items() if k in self.device_name]
        text = f"{seconds * 1000:.1f} ms | {rate:,.0f} tok/s"
        if peak:
            text += f" | {self.flops * rate / self.world.size / peak[0]:.1%} MFU"
        if self.world.device.type == "cuda":
            text += f" | {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        return text

    def val(self, step, loss):
        self.log(step, "val", f"{loss:.4f}")
        self.say(f"step {step:5d} | validation loss {loss:.4f}")
        self.clock = time.perf_counter()

    def hella(self, step, correct):
        p = correct.mean()
        if self.file:
            self.write(f"hella_{step}.npy", lambda f: np.save(f, correct))
        self.log(step, "hella", f"{p:.4f}")
        self.say(f"step {step:5d} | HellaSwag {p:.4f} +- {math.sqrt(p * (1 - p) / len(correct)):.4f}, {len(correct)} items in "
                 f"{time.perf_counter() - self.clock:.1f} s")
        self.clock = time.perf_counter()

    def sample(self, step, tokenizer):
        self.flush()
        if self.world.rank == 0:
            self.model.eval()
            with self.world.autocast():
                prompt = tokenizer.decode(tokenizer.encode_ordinary(PROMPT)[:self.cfg.block_size])
                text = generate(self.model, tokenizer, prompt, self.cfg.block_size, self.world.device, self.cfg.seed)
            self.model.train()
            self.say(f"step {step:5d} | sample: {text}")
        self.clock = time.perf_counter()

    def save(self, step):
        self.flush()
        if self.file:
            if self.seconds:
                self.tokens_per_second = round(self.cfg.total_batch_size / float(np.median(self.seconds)))
            state = {"arch": self.arch, "step": step, "config": asdict(self.model.cfg), "model": self.model.state_dict(),
                     "optimizer": self.optimizer.state_dict(), "tokens_per_second": self.tokens_per_second}
            self.saved = self.write(f"model_{step:05d}.pt", lambda f: torch.save(state, f))
            self.write_info()
            if self.cfg.keep_checkpoints:  # one of a later step would be damaged: it was passed over, and is not counted
                for path in [p for s, p in checkpoints(self.cfg.log_dir).items() if s <= step][self.cfg.keep_checkpoints:]:
                    os.remove(path)
        self.clock = time.perf_counter()

    def close(self):
        self.flush()
        self.bar.close()
        if self.bench:
            self.say(f"median of {self.bench} steps: {self.speed(float(np.median(self.seconds[BENCH_WARMUP:])))}")
        elif self.stopping:
            self.say(f"stopped; {self.saved} holds everything: go on with the same command and --resume=auto")
        else:
            self.say(f"log: {self.log_path}\ncheckpoint: {self.saved}\nnext: python train_{self.arch}.py "
                     f"--log_dir={shlex.quote(self.cfg.log_dir)} --sample=\"{PROMPT}\"")
        if self.world.size > 1:
            dist.destroy_process_group()
