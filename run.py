"""
A training run and its files in log_dir: log, console, checkpoints, resuming, and the modes --sample
and --export. A line of log.txt is `step stream value`, where step counts the updates made before.
No value depends on time: on a CPU the log of a resumed run equals that of an uninterrupted one.
"""
import glob
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
from contextlib import suppress
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist

from common import BENCH_WARMUP, generate, init_world, peak_flops
from fineweb import (GPT2_TOKENS, digest, explain, fail, get_tokenizer, lock_folder, n_tokens,
                     ranks_of, replacing, save_tokenizer, vocab_of)

PROMPT = "Hello, I'm a language model,"


# ---- memory --------------------------------------------------------------------------------------

def free_memory(device):
    """Return the bytes free on a GPU, or for each process of this machine; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as file:
            kilobytes = int(re.search(r"MemAvailable: *(\d+)", file.read())[1])
        return kilobytes * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def estimate_memory(cfg, world, Model, compiled):
    """Return (bytes for any batch, bytes for each row of it, seconds of a forward pass of a row),
    good to 30%: measured in the forward pass of one row through a model made for this alone."""
    kept = {}  # bytes of what the forward pass keeps for the backward pass

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself would keep the whole pass alive for ever

    with torch.random.fork_rng(devices=[]):
        model = Model(cfg).to(world.device)
    row = torch.zeros(1, cfg.block_size, dtype=torch.long, device=world.device)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    for _ in range(2):  # the first pass warms up, the second is timed
        kept.clear()
        start = time.perf_counter()
        with hooks, world.autocast():
            model(row, row)
        seconds = time.perf_counter() - start
    for p in model.parameters():
        kept.pop(p.data_ptr(), None)
    n_params = model.num_params()["total"]
    fixed = 16 * n_params  # weights, gradients and the two moments of AdamW, in fp32
    per_row = sum(kept.values())
    if world.dtype != torch.float32:
        fixed += 2 * n_params  # the weights in 16 bits, which are kept once, not for each row
        per_row -= 2 * n_params
    if compiled:
        per_row *= 0.65  # fused operations keep less: found with five of the models on an H200
    else:
        per_row += 3 * 4 * cfg.block_size * cfg.vocab_size  # logits and their gradients, in fp32
    return fixed, per_row, seconds


def check_memory(cfg, world, Model, accumulation):
    """Say what a step needs, and end if that is more memory than is free."""
    free = free_memory(world.device)
    fixed, per_row, seconds = estimate_memory(cfg, world, Model, cfg.compile)
    need = fixed + cfg.batch_size * per_row
    text = f"--batch_size={cfg.batch_size} needs about {need / 2**30:.1f} GiB of memory"
    if free is not None:
        text += f", and {free / 2**30:.1f} GiB are free"
    rows = accumulation * cfg.batch_size
    if world.device.type == "cpu":  # the backward pass takes about twice as long as the forward one
        seconds *= 3 * rows
        hours = seconds * cfg.max_steps / 3600
        text += f"; a step takes about {seconds:.0f} s, all steps {hours:,.1f} hours"
    if free is not None and need > free:
        fitting = [b for b in range(1, min(cfg.batch_size, 1024))
                   if rows % b == 0 and fixed + b * per_row <= free]
        batch = f"--batch_size={max(fitting)}, or " if fitting else ""
        fail(f"{text}: use {batch}a smaller model, for example with --tiny")
    if world.rank == 0 and need > 2**30:  # a small model needs no warning
        print(f"estimate: {text}", flush=True)


# ---- checkpoints ---------------------------------------------------------------------------------

def save_checkpoint(path, arch, step, model, vocab, optimizer_state, scaler, tokens_per_second):
    state = {"arch": arch, "step": step, "config": asdict(model.cfg), "model": model.state_dict(),
             "vocab": vocab, "optimizer": optimizer_state, "scaler": scaler.state_dict(),
             "tokens_per_second": tokens_per_second}
    with replacing(path) as file:
        torch.save(state, file)


def read_checkpoint(path):
    """Return what save_checkpoint wrote, on the CPU; never run code in it. May raise ValueError."""
    kinds = {"arch": str, "step": int, "config": dict, "model": dict, "optimizer": (dict, list)}
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for key, kind in kinds.items():
            if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), kind):
                raise ValueError(f"its entry {key!r} is missing or of another type")
        if checkpoint.setdefault("vocab", ""):  # old ones have GPT-2's vocabulary
            ranks_of(checkpoint["vocab"])  # raises an error if it is damaged
        return checkpoint
    except pickle.UnpicklingError:
        reason = "it is damaged, or not plain data: it may hold code, which was not run"
    except Exception as e:  # the error above, and the many that torch.load raises
        reason = str(e) or "it is empty"
    raise ValueError(f"{path} is not a readable checkpoint: {reason}")


def checkpoints(folder):
    """Return {step: path} of the checkpoints in a folder, the newest first."""
    found = {}
    for path in glob.glob(os.path.join(glob.escape(folder), "model_*.pt")):
        match = re.fullmatch(r"model_(\d{5,})\.pt", os.path.basename(path))
        if match and os.path.isfile(path):
            found[int(match[1])] = path
    return dict(sorted(found.items(), reverse=True))


def delete_old_checkpoints(folder, step, keep):
    """Delete the checkpoints up to this step, except the newest `keep`; none if keep is 0. A later
    one stays: it must be damaged, or the run would have resumed from it."""
    paths = [path for found, path in checkpoints(folder).items() if found <= step]
    for path in paths[keep:] if keep else []:
        os.remove(path)


def find_checkpoint(cfg, arch):
    """Return (path, checkpoint) of the file that --resume names, or of the newest readable one in
    log_dir for "auto" and ""; (None, {}) if there is none."""
    automatic = cfg.resume in ("", "auto")
    errors = []
    for path in checkpoints(cfg.log_dir).values() if automatic else [cfg.resume]:
        try:
            checkpoint = read_checkpoint(path)
        except ValueError as e:
            errors.append(e)
            continue
        for e in errors:
            print(f"passed over: {e}", file=sys.stderr)
        if (other := checkpoint["arch"]) != arch:
            fail(f"{path} holds a {other} model, not {arch}: use train_{other}.py")
        return path, checkpoint
    if errors:
        fail(errors[0])
    return None, {}


def load_model(path, checkpoint, Config, Model):
    """Return the model of a checkpoint in the shape in which it was trained, for evaluation."""
    with explain(f"{path} has options that its script does not know", TypeError, ValueError):
        model = Model(Config(**checkpoint["config"]))
    with explain(f"{path} does not fit its script", AttributeError, RuntimeError):
        model.load_state_dict(checkpoint["model"])
    return model.eval()


def resume(cfg, arch, world, model, vocab, optimizer, scaler):
    """Load the checkpoint that --resume names, if any, into model and optimizer. Return its path,
    step and tokens/s, or (None, 0, None). End if results of this or another run would be lost."""
    path, checkpoint = find_checkpoint(cfg, arch) if cfg.resume else (None, {})
    step, folder = checkpoint.get("step", 0), cfg.log_dir
    message = f"no checkpoint in {folder}: starting at step 0"
    if path:
        if not 0 <= step <= cfg.max_steps:
            fail(f"{path} is at step {step}, beyond --max_steps={cfg.max_steps}")
        if cfg.resume != "auto" and max(checkpoints(folder), default=0) > step:
            fail(f"{folder} has later checkpoints than {path}: move them away, or change --log_dir")
        has_log = os.path.exists(os.path.join(folder, "log.txt"))
        if has_log and not os.path.samefile(os.path.dirname(os.path.abspath(path)), folder):
            fail(f"{folder} holds the log of another run than {path}: use another --log_dir")
        # other options may change, but not the model, the kind of optimizer, and the number of
        # tokens in a step, which gives the place in the data
        saved, now = checkpoint["config"], asdict(model.cfg)
        differing = [name for name in now if saved.get(name) != now[name] and name != "resume"]
        fixed = [*cfg.option_groups()["model"], "optimizer", "total_batch_size"]
        wanted = [f"--{name}={saved.get(name)}" for name in differing if name in fixed]
        if wanted:
            fail(f"{path} has another shape, optimizer or number of tokens in a step; to resume "
                 f"it use {' '.join(wanted)}")
        if checkpoint["vocab"] != vocab:
            fail(f"{path} has another vocabulary than --data_dir={cfg.data_dir}: use the data with "
                 "which it was trained")
        changes = "".join(f", {name} {saved.get(name)} -> {now[name]}" for name in differing)
        message = f"resumed {path} at step {step}{changes}"
        with explain(f"{path} does not fit train_{arch}.py", AttributeError, RuntimeError):
            model.load_state_dict(checkpoint["model"])
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        misfits = AttributeError, LookupError, TypeError, ValueError
        with explain(f"{path} holds no state of this version's optimizer", *misfits):
            optimizer.load_state_dict(checkpoint["optimizer"])
            for p, state in optimizer.state.items():
                for name, x in state.items():  # AdamW would write beyond the end of a smaller one
                    if name != "step" and x.shape != p.shape:
                        raise ValueError(f"{name} has another shape than its parameter")
        for group, options in zip(optimizer.param_groups, groups):
            group.update(options)  # weight decay, betas and so on are those of the command line
        if checkpoint.get("scaler"):  # it is empty unless the run used float16
            scaler.load_state_dict(checkpoint["scaler"])
    # the sum over the processes is step * size only if all of them resume from the same step
    if world.sum(torch.tensor(float(step), device=world.device)) != step * world.size:
        fail(f"the processes find different checkpoints: they must share --log_dir={folder}")
    if cfg.resume and world.rank == 0:
        print(message, flush=True)
    return path, step, checkpoint.get("tokens_per_second")


# ---- log and console -----------------------------------------------------------------------------

class Run:
    """Log and console of a training run. Every process calls its methods; only rank 0 writes. The
    numbers of an update on a GPU are read during the next update, so that the GPU never waits."""

    def __init__(self, cfg, arch, world, model, optimizer, scaler, val_loader, hellaswag, bench):
        """Resume, if --resume says so. hellaswag: the scorer, or None. bench: number of steps to
        time, or 0."""
        self.cfg = cfg
        self.arch = arch
        self.world = world
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.val_loader = val_loader
        self.hellaswag = hellaswag
        self.bench = bench
        self.vocab = vocab_of(cfg.data_dir)
        writes = world.rank == 0 and not bench
        is_new = not os.path.isdir(cfg.log_dir)
        if writes and not is_new:  # before resuming, as the run that has the lock might yet save
            self.lock = lock_folder(cfg.log_dir, "--log_dir")  # until this process ends
        world.check_same("their options", asdict(cfg) | dict(data_dir="", hellaswag_file=""))
        start = resume(cfg, arch, world, model, self.vocab, optimizer, scaler)
        self.checkpoint, self.start_step, self.tokens_per_second = start
        self.cuda = world.device.type == "cuda"
        self.device_name = torch.cuda.get_device_name() if self.cuda else world.device.type
        self.flops_per_token = model.flops_per_token()
        self.pending = deque()  # updates whose numbers are still to be read
        self.lag = int(self.cuda)  # how many updates may be pending
        self.clock = time.perf_counter()  # when the oldest pending update began
        self.seconds = []  # the duration of each update
        self.signalled = False  # whether this process was asked to stop
        self.stopping = False  # whether any process was: all of them stop at the same step
        self.log_path = os.path.join(cfg.log_dir, "log.txt")
        self.file = None  # the open log.txt, in the process that writes
        if writes:
            if is_new:
                self.lock = lock_folder(cfg.log_dir, "--log_dir")
            self.starts = self.earlier_starts()
            self.open_log()
            self.write_info()
        for signum in signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM):
            if signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(signum, self.on_signal)
        params = model.num_params()
        self.say(f"{arch}: {params['total']:,} parameters, {params['active']:,} active per token, "
                 f"{self.flops_per_token / 1e6:.1f} MFLOP/token, {world.size} x {self.device_name}")

    def read_log(self):
        """Return the lines of log.txt as (step, stream, line), without the last if it was cut."""
        if not os.path.exists(self.log_path):
            return []
        with open(self.log_path, errors="replace") as file:
            lines = file.read().split("\n")[:-1]
        parsed = []
        for number, line in enumerate(lines, 1):
            match = re.fullmatch(r"(\d+) (\w+) \S+", line)
            if not match:
                fail(f"{self.log_path}, line {number} is not 'step stream value': repair or delete "
                     "the line, or use another --log_dir")
            parsed.append((int(match[1]), match[2], f"{line}\n"))
        return parsed

    def open_log(self):
        """Open log.txt, without the lines that this start writes again. End if results would be
        lost."""
        folder, lines = self.cfg.log_dir, self.read_log()
        last = max((step for step, stream, _ in lines if stream == "train"), default=-1)
        if not self.cfg.resume and (checkpoints(folder) or last >= 0):
            fail(f"{folder} holds a run: continue with --resume=auto, or use another --log_dir")
        if self.start_step == 0 and last >= self.cfg.checkpoint_interval > 0:
            fail(f"{folder} has a log but no checkpoint: put one back, or use another --log_dir")
        # evaluations at start_step stay if they are not made again now
        hella = {"hella", "hella_bpb", "hella_gap"}
        stays = {"val", "bpb", "val_full", "bpb_full"} | hella
        if self.evaluation_due(self.start_step):
            stays = set() if self.hellaswag else hella
        with replacing(self.log_path) as file:
            for step, stream, line in lines:
                if step < self.start_step or (step == self.start_step and stream in stays):
                    file.write(line.encode())
        self.file = open(self.log_path, "a", buffering=1)

    def earlier_starts(self):
        """Return the starts in run.json beside the checkpoint, the oldest first, and this one."""
        here = shlex.quote(os.path.dirname(os.path.abspath(__file__)))
        this = {
            "step": self.start_step, "command": sys.argv, "config": asdict(self.cfg),
            "device": self.device_name, "processes": self.world.size, "torch": torch.__version__,
            "python": sys.version,
            "git_commit": subprocess.getoutput(f"git -C {here} rev-parse HEAD 2>{os.devnull}")}
        path = os.path.join(os.path.dirname(self.checkpoint or ""), "run.json")
        if self.checkpoint is None or not os.path.exists(path):
            return [this]
        with explain(f"{path} is damaged: repair or delete it", ValueError, TypeError):
            with open(path) as file:
                info = dict(json.load(file))
        # an old run.json has no list of starts, and describes only the latest
        first = {name: info.get(name) for name in this} | {"step": 0}
        return [*info.get("starts", [first]), this]

    def write_info(self):
        """Write run.json: the run as it is now, and every start of it. Its speed is that of the
        median step, without evaluations."""
        known = self.vocab or self.cfg.vocab_size >= GPT2_TOKENS
        vocab = {"name": "own" if self.vocab else "gpt2", "tokens": n_tokens(self.vocab),
                 "sha256": digest(self.vocab)}
        info = {"arch": self.arch, "params": self.model.num_params(),
                "vocab": vocab if known else None, "val_text": self.val_loader.val_text,
                "bytes_per_token": self.val_loader.bytes_per_token,
                "flops_per_token": self.flops_per_token,
                "tokens_per_second": self.tokens_per_second, **self.starts[-1],
                "starts": self.starts}
        del info["step"]
        with replacing(os.path.join(self.cfg.log_dir, "run.json")) as file:
            file.write(json.dumps(info, indent=1).encode())

    def log(self, step, stream, value):
        if self.file:
            self.file.write(f"{step} {stream} {value}\n")

    def say(self, text):
        if self.world.rank == 0:
            try:
                print(text, flush=True)
            except OSError:  # the console is closed, for example by `| head`: save and stop
                self.signalled = True
                sys.stdout = open(os.devnull, "w")

    def on_signal(self, signum, frame):
        """Let the loop stop after this step; a second Ctrl-C ends the process at once."""
        self.signalled = True
        if signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
            if self.world.rank == 0:  # the signal may come during a print, which forbids another
                with suppress(OSError):  # Ctrl-C also ends the reader of a pipe, such as `| tee`
                    os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once, "
                                b"without saving\n")

    def until_signal(self, batches):
        """Yield the batches of an evaluation, which is given up when this process must stop."""
        for batch in batches:
            if self.signalled or self.stopping:
                return
            yield batch

    def evaluation_due(self, step):
        interval = self.cfg.eval_interval
        return interval > 0 and (step % interval == 0 or step == self.cfg.max_steps)

    def begin_update(self):
        """Start the clock, unless it runs for an update that is pending."""
        if not self.pending:
            self.clock = time.perf_counter()

    def log_train(self, step, loss, norm, lr):
        """Log update `step`: loss and gradient norm (tensors) and learning rate."""
        extra = self.model.extra_logs() if hasattr(self.model, "extra_logs") else {}
        signalled = torch.full_like(loss, self.signalled)  # after the sum every process knows
        numbers = torch.stack([loss, norm, signalled, *extra.values()]) / self.world.size
        numbers = self.world.sum(numbers).to("cpu", non_blocking=self.cuda)
        copied = torch.cuda.Event() if self.cuda else None
        if copied:
            copied.record()
        self.pending.append((step, lr, list(extra), numbers, copied))
        # the last update is read at once, because a stopped run skips the final evaluation
        lag = self.lag if step + 1 < self.cfg.max_steps else 0
        while len(self.pending) > lag:
            self.log_oldest()

    def log_oldest(self):
        step, lr, names, numbers, copied = self.pending.popleft()
        if copied:
            copied.synchronize()
        loss, norm, signalled, *extra = numbers.tolist()
        self.seconds.append(time.perf_counter() - self.clock)
        self.clock += self.seconds[-1]
        # with float16 the scaler skips such an update and lowers its scale, which is 1 otherwise
        skipped = not math.isfinite(norm)
        if not math.isfinite(loss) or (skipped and self.scaler.get_scale() <= 1):
            fail(f"step {step}: loss {loss}, gradient norm {norm}; not saved. Start again from "
                 f"{self.checkpoint or 'step 0'} with a lower --learning_rate, or longer warm-up")
        self.stopping = signalled > 0
        values = {"train": f"{loss:.6f}", "lr": f"{lr:.4e}", "norm": f"{norm:.4f}"}
        values |= {name: f"{value:.4f}" for name, value in zip(names, extra)}
        values |= {"skipped": "1"} if skipped else {}
        text = f"step {step:5d}/{self.cfg.max_steps}"
        for stream, value in values.items():
            self.log(step, stream, value)
            text += f" | {'loss' if stream == 'train' else stream} {value}"
        minutes = (self.cfg.max_steps - step - 1) * np.median(self.seconds[-100:]) / 60
        self.say(f"{text} | {self.speed(self.seconds[-1])} | {minutes:.0f} min left")

    def flush(self):
        """Log what is pending, so that nothing is evaluated or saved after a bad update."""
        while self.pending:
            self.log_oldest()

    def speed(self, seconds):
        """Return a step's time, tokens/s, MFU (PaLM paper, appendix B) and memory as text."""
        rate = self.cfg.total_batch_size / seconds
        text = f"{seconds * 1000:.1f} ms | {rate:,.0f} tok/s"
        if peak := peak_flops(self.device_name):
            text += f" | {self.flops_per_token * rate / self.world.size / peak:.1%} MFU"
        if self.cuda:
            text += f" | {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        return text

    def gave_up(self):
        """Whether an evaluation is incomplete because any process was asked to stop."""
        signalled = torch.tensor(float(self.signalled), device=self.world.device)
        self.stopping = self.world.sum(signalled).item() > 0
        return self.stopping

    def log_val(self, step, stream, table):
        """Log validation loss and bits per byte, and keep the mean loss of each row, float32
        (rows,). stream: "val" or "val_full". table: a loss_table with the rows of this process."""
        table = self.world.sum(table).cpu().double()
        if self.gave_up():
            return
        table = table[table[:, 1] > 0]  # without the padding of the last batch
        nats, n_targets, text_nats, text_bytes = table.sum(0).tolist()
        if self.file:
            with replacing(os.path.join(self.cfg.log_dir, f"{stream}_{step}.npy")) as file:
                np.save(file, (table[:, 0] / table[:, 1]).float().numpy())
        loss = f"{nats / n_targets:.4f}"
        self.log(step, stream, loss)
        name = "validation loss" if stream == "val" else "full validation loss"
        text = f"step {step:5d} | {name} {loss}"
        if text_bytes:
            bpb = f"{text_nats / text_bytes / math.log(2):.4f}"
            self.log(step, stream.replace("val", "bpb"), bpb)
            text += f" | {bpb} bits per byte"
        self.say(text)
        self.clock = time.perf_counter()  # from here log_hella measures its time

    def log_hella(self, step, losses):
        """Log acc_norm as `hella`, bits per byte of the right endings as `hella_bpb`, and how much
        likelier they are than the wrong ones as `hella_gap`. Keep the loss of each ending: float32
        (items, 4)."""
        if self.gave_up():
            return
        if self.file:
            self.hellaswag.save(os.path.join(self.cfg.log_dir, f"hella_{step}.npz"), losses)
        scores = self.hellaswag.scores(losses)
        correct = scores["acc_norm"]
        p, error = correct.mean(), correct.std() / math.sqrt(len(correct))
        bpb, gap = scores["bpb"].mean(), scores["gap"].mean()
        self.log(step, "hella", f"{p:.4f}")
        self.log(step, "hella_bpb", f"{bpb:.4f}")
        self.log(step, "hella_gap", f"{gap:.5f}")
        seconds = time.perf_counter() - self.clock
        self.say(f"step {step:5d} | HellaSwag {p:.4f} +- {error:.4f} | {bpb:.4f} bits per byte | "
                 f"gap {gap:.5f} | {len(correct)} items in {seconds:.1f} s")

    def show_sample(self, step, tokenizer):
        self.flush()
        if self.world.rank == 0:
            prompt = tokenizer.encode_ordinary(PROMPT)[:self.cfg.block_size]
            self.model.eval()
            with self.world.autocast():
                text = generate(self.model, tokenizer, prompt, self.world.device, self.cfg.seed)
            self.model.train()
            self.say(f"step {step:5d} | sample: {text}")

    def save(self, step):
        """Write a checkpoint, and delete those that are too old."""
        self.flush()
        optimizer_state = self.optimizer.state_dict()  # all processes take part in it
        if self.file:
            if self.seconds:
                self.tokens_per_second = round(self.cfg.total_batch_size / np.median(self.seconds))
            self.checkpoint = os.path.join(self.cfg.log_dir, f"model_{step:05d}.pt")
            save_checkpoint(self.checkpoint, self.arch, step, self.model, self.vocab,
                            optimizer_state, self.scaler, self.tokens_per_second)
            self.write_info()
            delete_old_checkpoints(self.cfg.log_dir, step, self.cfg.keep_checkpoints)

    def close(self):
        """Say how the run ended and what to do next."""
        self.flush()
        if self.bench:
            timed = self.seconds[BENCH_WARMUP:]
            self.say(f"median of {len(timed)} steps: {self.speed(np.median(timed))}" if timed
                     else "stopped before a step was timed")
        elif self.stopping:
            self.say(f"stopped; {self.checkpoint} holds everything: continue with --resume=auto")
        else:
            folder = shlex.quote(self.cfg.log_dir)
            self.say(f"log: {self.log_path}\ncheckpoint: {self.checkpoint}\nnext: python "
                     f"train_{self.arch}.py --log_dir={folder} --sample=\"{PROMPT}\"")
        if self.world.size > 1:
            dist.destroy_process_group()


# ---- the modes --sample and --export -------------------------------------------------------------

def use_checkpoint(cfg, mode, arch, Config, Model, to_hf):
    """Do what --sample or --export asks for."""
    path, checkpoint = find_checkpoint(cfg, arch)
    if path is None:
        fail(f"no checkpoint in {cfg.log_dir}: train first, or use --resume=FILE or --log_dir=DIR")
    model = load_model(path, checkpoint, Config, Model)
    if mode.export is not None:
        export(model, path, checkpoint, mode.export, to_hf)
        print(f"wrote {path}, step {checkpoint['step']}, to {mode.export}")
        return
    device = init_world(cfg.device, cfg.dtype, cfg.seed).device
    tokenizer = get_tokenizer(checkpoint["vocab"], model.cfg.vocab_size) or sys.exit(1)  # said why
    print(f"{path}, step {checkpoint['step']}", file=sys.stderr)
    prompt = tokenizer.encode_ordinary(mode.sample)
    print(generate(model.to(device), tokenizer, prompt, device, cfg.seed, mode.max_new_tokens,
                   mode.temperature))


def export(model, path, checkpoint, folder, to_hf):
    """Write a Hugging Face folder, or model.pth if to_hf returns a state dict."""
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        fail(f"--export={folder} is not empty, or not a folder: choose a new name")
    tokenizer = get_tokenizer(checkpoint["vocab"], model.cfg.vocab_size)
    with explain("--export failed; try transformers 5 (pip install -U transformers)", Exception):
        exported = to_hf(model)  # what an old version lacks shows in errors of many types
    try:
        os.makedirs(folder, exist_ok=True)
        if isinstance(exported, dict):
            torch.save(exported, os.path.join(folder, "model.pth"))
        else:
            if tokenizer:
                for config in exported.config, exported.generation_config:
                    config.bos_token_id = config.eos_token_id = tokenizer.eot_token
            exported.save_pretrained(folder)
            with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
                file.write(model_card(model, path, checkpoint, type(exported).__name__))
        if tokenizer:
            save_tokenizer(folder, tokenizer, model.cfg.block_size)
    except Exception as e:  # torch.save and safetensors each wrap the OSError of a full disk
        shutil.rmtree(folder, ignore_errors=True)
        fail(f"cannot write {folder}: {e}")


def model_card(model, path, checkpoint, class_name):
    """Return a README.md with what is known of the checkpoint: its scores, if its step was
    evaluated, stand in log.txt and hella_*.npz beside it."""
    cfg, step = model.cfg, checkpoint["step"]
    data = os.path.basename(os.path.abspath(cfg.data_dir))
    text = f"""---
library_name: transformers
pipeline_tag: text-generation
---
- {class_name} with {model.num_params()['total']:,} parameters
- trained with train_{checkpoint['arch']}.py of NanoTitan: {step:,} steps, \
{step * cfg.total_batch_size:,} tokens of the folder {data}
"""
    log, hella = (os.path.join(os.path.dirname(path), f) for f in ("log.txt", f"hella_{step}"))
    if os.path.exists(log):
        with open(log, errors="replace") as file:
            for val in re.findall(rf"^{step} val (\S+)$", file.read(), re.M):
                text += f"- validation loss {val}\n"
    right = np.load(f"{hella}.npy") if os.path.exists(f"{hella}.npy") else None  # of an old run
    if os.path.exists(f"{hella}.npz"):
        saved = np.load(f"{hella}.npz")
        right = (saved["losses"] / saved["tokens"]).argmin(1) == saved["labels"]
    if right is not None:
        error = right.std() / math.sqrt(len(right))
        text += f"- HellaSwag, acc_norm: {right.mean():.4f} +- {error:.4f}, {len(right)} items\n"
    return text + f"""
```python
from transformers import pipeline  # FOLDER is where this file lies
generate = pipeline("text-generation", "FOLDER")
print(generate("{PROMPT}", max_new_tokens=50)[0]["generated_text"])
```
"""
