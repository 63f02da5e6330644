"""
What the test files share: helpers, which they import with `from conftest import ...`, and fixtures.

pytest imports this file before any test file. Each test runs in an empty folder, on a CPU, with small models whose
weights are random everywhere.
"""
import base64
import contextlib
import glob
import http.server
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import fields

# One thread, here and in subprocesses, gives equal bits; small models gain nothing from more.
os.environ["OMP_NUM_THREADS"] = "1"  # it must be set before torch is imported

import numpy as np
import pytest
import torch

import fineweb
import hellaswag
import run

ROOT = os.path.dirname(os.path.abspath(__file__))
ARCHS = sorted(os.path.basename(path)[len("train_"):-len(".py")] for path in glob.glob(f"{ROOT}/train_*.py"))
SCRIPTS = {arch: importlib.import_module(f"train_{arch}") for arch in ARCHS}
# the class of transformers that to_hf returns
HF = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi": "Phi3ForCausalLM",
    "gemma": "Gemma3ForCausalLM",
    "deepseek": "DeepseekV3ForCausalLM",
}
# Options that make a model small. Each script takes those that it knows.
SMALL = dict(
    n_layer=2, n_head=4, n_kv_head=2, head_dim=32, n_embd=64, ffn_dim=160, block_size=64, vocab_size=512,
    window=16, window_pattern=2, partial_rotary_factor=0.75, kq_period=2,
    q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=20,
    moe_ffn_dim=48, n_routed_experts=16, n_activated_experts=4, n_group=4, topk_group=2)
# Options of a quick run that does everything: 512 tokens a step, evaluation, checkpoints.
QUICK = ["--tiny", "--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32", "--total_batch_size=512",
         "--batch_size=4", "--max_steps=8", "--eval_interval=4", "--checkpoint_interval=2", "--val_tokens=2048",
         "--val_full_tokens=4096", "--sample_interval=0", "--optimizer=adamw", "--learning_rate=3e-3",
         "--warmup_steps=40"]

BYTE_VOCAB = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))

each_arch = pytest.mark.parametrize("arch", ARCHS)
# the laboratory's log is LLaMA's byte for byte, so that longer runs would show nothing new
each_trained = pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch != "hybrid"])
each_in_transformers = pytest.mark.parametrize("arch", sorted(HF))
each_with_attention = pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch != "rwkv"])


# ---- files and models ------------------------------------------------------------------------------------------------

def source_of(name):
    """Return the text of a file of this repository."""
    with open(os.path.join(ROOT, name)) as f:
        return f.read()


def small_config(arch, **options):
    """Return the Config of a small model; options replace values of SMALL, and those the script lacks, or
    knows as another type, are left out."""
    kinds = {field.name: field.type for field in fields(SCRIPTS[arch].Config)}
    wanted = {**SMALL, **options}
    chosen = {name: value for name, value in wanted.items() if isinstance(value, kinds.get(name, ()))}
    return SCRIPTS[arch].Config(**chosen)


def small_model(arch, seed=0, **options):
    """Return a small model in eval mode with every parameter random, so that a mistake with any of them shows.

    Vectors, which include RWKV's (1, 1, C), lie around 1 and matrices around 0. RWKV's decay is slow enough to reach
    back. DeepSeek's biases of the choice of experts are random, too."""
    torch.manual_seed(seed)
    model = SCRIPTS[arch].Model(small_config(arch, **options)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            is_vector = p.numel() == p.size(-1)
            mean = -2.0 if name.endswith("w0") else float(is_vector)
            std = 0.5 if is_vector else 0.1
            p.copy_(torch.randn_like(p) * std + mean)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(std=0.2)
    return model


def tokens(*shape, vocab=512, seed=1):
    """Return random token ids below vocab: int64 of the given shape."""
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def shards(folder, n_train=30000, n_val=5000, vocab=256, parts=3, seed=0):
    """Write shards of random tokens, the training tokens in parts of random length; return (train, val) as arrays."""
    rng = np.random.default_rng(seed)
    train = rng.integers(0, vocab, n_train, np.uint16)
    val = rng.integers(0, vocab, n_val, np.uint16)
    os.makedirs(folder, exist_ok=True)
    if vocab == 256:
        with open(f"{folder}/vocab.tiktoken", "w") as f:
            f.write(BYTE_VOCAB)
    fineweb.write_shard(f"{folder}/x_val_000000.bin", val)
    cuts = [0, *sorted(rng.integers(1, n_train, parts - 1).tolist()), n_train]
    for i, (begin, end) in enumerate(zip(cuts, cuts[1:]), 1):
        fineweb.write_shard(f"{folder}/x_train_{i:06d}.bin", train[begin:end])
    return train, val


# ---- runs ------------------------------------------------------------------------------------------------------------

def quick(arch):
    """Return QUICK with what an architecture needs in addition or does not know."""
    if arch == "rwkv":
        return [option for option in QUICK if not option.startswith("--n_head=")] + ["--head_dim=16"]
    if arch == "deepseek":
        return [*QUICK, "--n_dense_layer=0"]
    if arch == "mta":
        return [*QUICK, "--kq_period=1"]
    return QUICK


def train(arch, monkeypatch, *options):
    """Run main() of a training script in this process, as if started from the shell in the current folder."""
    monkeypatch.setattr(sys, "argv", [f"train_{arch}.py", *options])
    locks = []
    monkeypatch.setattr(run, "lock_folder", lambda *args: locks.append(fineweb.lock_folder(*args)))
    try:
        SCRIPTS[arch].main()
    finally:
        for lock in locks:
            lock.close()  # as the end of a process would


def shell(script, *options, processes=0):
    """Run a script of this repository in the current folder, by torchrun where processes are given.

    Returns subprocess's CompletedProcess with stdout and stderr as text."""
    launch = [sys.executable]
    if processes:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run([*launch, os.path.join(ROOT, script), *options], capture_output=True, text=True)


def bad(capsys, call, *words):
    """Assert that call() ends with exit code 1 and one line on stderr, which sys.exit prints, that holds all words."""
    with pytest.raises(SystemExit) as e:
        call()
    message = e.value.code
    assert isinstance(message, str) and "\n" not in message, message
    for word in words:
        assert word in message, message


def log_of(folder="log/gpt2-tiny"):
    """Return the bytes of a run's log."""
    with open(f"{folder}/log.txt", "rb") as f:
        return f.read()


def stream_of(name, folder):
    """Return the values of one stream ("train", "val", ...) of a run's log, as an array."""
    lines = [line.split() for line in log_of(folder).decode().splitlines()]
    return np.array([float(value) for _, stream, value in lines if stream == name])


def checkpoint_of(folder="log/gpt2-tiny", step=8):
    """Return a run's checkpoint as a dict; without a step, that of the last step of a quick run."""
    return run.read_checkpoint(f"{folder}/model_{step:05d}.pt")


def trained_model(arch):
    """Return the model that a quick run with the default folder has left behind."""
    script = SCRIPTS[arch]
    return run.load_model("x", checkpoint_of(f"log/{arch}-tiny"), script.Config, script.Model)


def byte_tokenizer():
    """Return the tokenizer whose tokens are the 256 bytes, and <|endoftext|>."""
    return fineweb.get_tokenizer(BYTE_VOCAB, 257)


def write_jsonl(path, items):
    """Write a list as a file of JSON lines."""
    with open(path, "w") as f:
        f.writelines(json.dumps(item) + "\n" for item in items)


# ---- the network -----------------------------------------------------------------------------------------------------

class Answer(http.server.BaseHTTPRequestHandler):
    """A handler that writes no log to stderr."""

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve(handler):
    """Serve HTTP on the loopback with a handler class; yields the address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


# ---- fixtures --------------------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Give every test an empty working folder, and the process its signal handlers back."""
    monkeypatch.chdir(tmp_path)
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield tmp_path
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture(scope="session")
def gpt2_bpe():
    """Return GPT-2's BPE of tiktoken; without it the test is skipped."""
    tokenizer = fineweb.get_tokenizer("", 50304)
    return tokenizer or pytest.skip("GPT-2's BPE is neither in TIKTOKEN_CACHE_DIR nor to be downloaded")


class Reduced:
    """GPT-2's BPE folded to a small vocabulary, so that all 10,042 items are quick."""

    n_vocab = 512
    eot_token = 0

    def __init__(self, bpe):
        self.bpe = bpe

    def encode_ordinary(self, text):
        return [token % self.n_vocab for token in self.bpe.encode_ordinary(text)]


@pytest.fixture(scope="session")
def hellaswag_path(tmp_path_factory):
    """Return the path of the HellaSwag file: HELLASWAG_FILE or a download. Without either the test is skipped."""
    path = os.environ.get("HELLASWAG_FILE")
    if not path:
        path = str(tmp_path_factory.mktemp("hellaswag") / hellaswag.FILE)
        try:
            hellaswag.download(path)
        except OSError as e:
            pytest.skip(f"no HELLASWAG_FILE and no network: {e}")
    return path


@pytest.fixture(scope="session")
def hellaswag_items(hellaswag_path):
    """Return the items of HellaSwag's validation set as a list of dicts."""
    return hellaswag.load_items(hellaswag_path)
