"""
Training is checked on a CPU: the data loader and the schedule, HellaSwag, whole runs from the shell and in this
process, and bad input, which must end with one line and lose nothing.

    pytest -q test_training.py                             # this file alone; test_models.py says what to install
    pytest -q test_training.py -k hellaswag                # HellaSwag
    pytest -q test_training.py -k "resume or killed or interrupted"    # runs that stop and resume
    pytest -q test_training.py -k "full_disk or bad_options"           # some of the bad input

The references are slices of the token stream, a HellaSwag loop that scores one item at a time with all logits,
EleutherAI's lm-evaluation-harness, torch's own cosine schedule, transformers for exported models, and a second run that
nothing has interrupted, split or compiled: its log must be the same.

HELLASWAG_FILE may name the HellaSwag file, and TIKTOKEN_CACHE_DIR a folder with GPT-2's BPE. Tests that need either are
skipped where it is neither there nor to be downloaded; the comparisons with the harness are skipped without lm_eval.
OLD_TRANSFORMERS may name a folder with transformers 4, which then reads the exports, too: pip install --target FOLDER
--no-deps transformers==4.57.1 huggingface_hub==0.36.0 tokenizers==0.22.1
"""
import contextlib
import filecmp
import gc
import glob
import hashlib
import json
import lzma
import math
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import fineweb
import hellaswag
import run
from conftest import (ARCHS, HF, QUICK, ROOT, SCRIPTS, Answer, Reduced, bad, byte_tokenizer, checkpoint_of,
                      each_arch, each_in_transformers, each_trained, log_of, quick, serve, shards, shell,
                      small_model, stream_of, tokens, train, trained_model, write_jsonl)


def cpu_world(rank=0, size=1):
    """Return the World of one of `size` processes, on the CPU."""
    return common.World(torch.device("cpu"), rank, size)


# ---- data and schedule -----------------------------------------------------------------------------------------------

def loader(split, world_size=1, rank=0, **options):
    """Return the ShardLoader of a split for a small Config, whose values options replace."""
    small = dict(block_size=16, batch_size=4, total_batch_size=1024, vocab_size=256, data_dir="data", val_tokens=3000)
    cfg = SCRIPTS["gpt2"].Config(**{**small, **options})
    return common.ShardLoader(cfg, split, cpu_world(rank, world_size))


@pytest.mark.parametrize("batch_size, world_size", [(4, 1), (16, 1), (64, 1), (2, 2), (4, 8), (1, 4)])
def test_a_step_is_a_slice_of_the_stream(batch_size, world_size):
    """Step s is tokens [1024 s, 1024 (s + 1)) for every split into processes and micro-steps, from every starting step,
    over shard boundaries and, after 29 steps, over the end of the data."""
    train_tokens, _ = shards("data")
    stream = np.concatenate([train_tokens, train_tokens])
    micro_steps = 1024 // (16 * batch_size * world_size)
    for start in 0, 27:
        ranks = []
        for rank in range(world_size):
            ranks.append(loader("train", world_size, rank, batch_size=batch_size).train_batches(start, micro_steps))
        for step in range(start, start + 4):
            inputs = []
            targets = []
            for _ in range(micro_steps):
                for batches in ranks:
                    x, y = next(batches)
                    inputs.append(x)
                    targets.append(y)
            begin = 1024 * step
            end = 1024 * (step + 1)
            assert (torch.cat(inputs).flatten().numpy() == stream[begin:end]).all()
            assert (torch.cat(targets).flatten().numpy() == stream[begin + 1:end + 1]).all()


@pytest.mark.parametrize("val_tokens, n", [(3000, 3000), (10**6, 4999), (16, 16), (17, 17)])
@pytest.mark.parametrize("batch_size, world_size", [(4, 1), (3, 2), (64, 1), (5, 4)])
def test_validation_is_the_same_tokens_for_every_batch_size(val_tokens, n, batch_size, world_size):
    _, val = shards("data")
    seen = []
    for rank in range(world_size):
        data = loader("val", world_size, rank, batch_size=batch_size)
        for _, x, y in data.val_batches(val_tokens):
            assert x.shape == y.shape == (batch_size, 16)
            for inputs, targets in zip(x, y):
                used = targets >= 0
                seen += [(inputs[used].tolist(), targets[used].tolist())] if used.any() else []
    expected = [(val[i:min(i + 16, n)].tolist(), val[i + 1:min(i + 16, n) + 1].tolist()) for i in range(0, n, 16)]
    assert sorted(seen) == sorted(expected)


def corrupt(path, at, value, dtype=np.int32):
    """Overwrite one number of a file, at an offset in bytes."""
    with open(path, "r+b") as f:
        f.seek(at)
        f.write(np.array([value], dtype).tobytes())


def overwrite(path, data):
    """Put other bytes into a file."""
    with open(path, "wb") as f:
        f.write(data)


def test_bad_data_is_one_line(capsys):
    path = "data/x_train_000002.bin"
    bad(capsys, lambda: loader("train"), "data", "fineweb.py")
    os.mkdir("data")
    bad(capsys, lambda: loader("train"), "no train shards", "data")
    damages = [  # what is done to the shard, what the error must say
        (lambda: corrupt(path, 0, 7), "not a"),
        (lambda: corrupt(path, 4, 2), "not a"),
        (lambda: corrupt(path, 8, 5), "tokens"),
        (lambda: corrupt(path, 8, -5), "tokens"),
        (lambda: os.truncate(path, os.path.getsize(path) - 2), "tokens"),
        (lambda: os.truncate(path, 100), "not a"),
        (lambda: overwrite(path, b"\x93NUMPY" + b"x" * 3000), "not a"),
    ]
    for damage, word in damages:
        shards("data")
        damage()
        bad(capsys, lambda: loader("train"), path, word)
    shards("data")
    os.remove("data/x_val_000000.bin")
    bad(capsys, lambda: loader("val"), "no val shards")
    shards("data", n_val=16)
    bad(capsys, lambda: loader("val"), "block_size=16")
    shards("data")
    bad(capsys, lambda: loader("val", val_tokens=15), "val_tokens=15")
    corrupt("data/x_train_000001.bin", 1024 + 20, 300, np.uint16)

    def first_batch():
        return next(loader("train").train_batches(0, 1))

    bad(capsys, first_batch, "x_train_000001.bin", "token 300", "only 256", "vocab_size")


def test_cosine_schedule():
    cfg = SCRIPTS["gpt2"].Config()
    lr = [common.cosine_lr(cfg, step) for step in range(cfg.max_steps + 2)]
    assert lr[0] == pytest.approx(6e-4 / 715)
    assert lr[714] == lr[715] == pytest.approx(6e-4)
    assert lr[(715 + 19073) // 2] == pytest.approx(3.3e-4)
    assert lr[19073] == lr[19074] == pytest.approx(6e-5)
    # torch's own cosine is the reference
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=19073 - 715, eta_min=0.1)
    for step in range(715, 3000):
        assert lr[step] == pytest.approx(6e-4 * optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    common.cosine_lr(SCRIPTS["gpt2"].Config(max_steps=5, warmup_steps=5), 5)


def test_batch_that_does_not_divide(monkeypatch, capsys):
    def attempt(option):
        train("gpt2", monkeypatch, *QUICK, option)
    bad(capsys, lambda: attempt("--batch_size=3"), "batch_size=3", "[1, 2, 4, 8, 16]")
    bad(capsys, lambda: attempt("--block_size=33"), "block_size=33", "no --batch_size does")


# ---- HellaSwag -------------------------------------------------------------------------------------------------------

def answers(scorer, model):
    """Return a scorer's answers for a model as one array: right by acc, by acc_norm, by acc_bytes (3, N)."""
    scores = scorer.scores(scorer.losses(model))
    return np.array([scores["acc"], scores["acc_norm"], scores["acc_bytes"]])


def one_at_a_time(model, items, encode):
    """Score as build-nanogpt does, one item at a time with all logits. Return (right by the loss, by that per token, by
    that per byte (3, N); the arrays of hella_<step>.npz)."""
    rows = []
    for item in items:
        context = encode(item["ctx"])
        endings = [encode(" " + ending) for ending in item["endings"]]
        idx = torch.zeros(4, len(context) + max(map(len, endings)), dtype=torch.long)
        mask = torch.zeros_like(idx)
        for row, ending in enumerate(endings):
            end = len(context) + len(ending)
            idx[row, :end] = torch.tensor(context + ending)
            mask[row, len(context):end] = 1
        with torch.no_grad():
            logits, _ = model(idx)
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten(), reduction="none").view(4, -1)
        n_bytes = [len(bytes(f" {ending}", "utf-8")) for ending in item["endings"]]
        rows.append(((losses * mask[:, 1:]).sum(1), mask.sum(1), torch.tensor(n_bytes)))
    sums, counts, n_bytes = (torch.stack(row).numpy() for row in zip(*rows))
    labels = np.array([item["label"] for item in items])
    right = [x.argmin(1) == labels for x in (sums, sums / counts, sums / n_bytes)]
    return np.array(right), {"losses": sums, "tokens": counts, "bytes": n_bytes, "labels": labels}


@each_trained
def test_hellaswag_equals_one_item_at_a_time(arch, gpt2_bpe, hellaswag_items, monkeypatch):
    """Every item of the whole set is scored (some of them for the later architectures), and 100 with other batches and
    paddings. The file has the numbers of each item, and the same bytes at any time."""
    items = hellaswag_items if arch == "gpt2" else hellaswag_items[::20]
    model = small_model(arch, n_layer=1, n_dense_layer=0, n_embd=32, n_head=2, block_size=192)
    encode = Reduced(gpt2_bpe)

    def scorer(items, batch_tokens=8192, compile=False):
        return hellaswag.HellaSwag(items, encode, 192, batch_tokens, cpu_world(), compile)

    whole = scorer(items)
    losses = whole.losses(model)
    scores = whole.scores(losses)
    ours = np.array([scores["acc"], scores["acc_norm"], scores["acc_bytes"]])
    reference, arrays = one_at_a_time(model, items, encode.encode_ordinary)
    right = [(i, label) for i, label in enumerate(arrays["labels"])]
    nats, n_bytes = arrays["losses"].astype(float), arrays["bytes"]
    bits_per_byte = sum(nats[i] for i in right) / sum(n_bytes[i] for i in right) / math.log(2)
    gaps = [np.delete(nats[i] / n_bytes[i], k).mean() - nats[i, k] / n_bytes[i, k] for i, k in right]
    assert scores["bpb"].mean() == pytest.approx(bits_per_byte, rel=1e-5)
    np.testing.assert_allclose(scores["gap"], gaps, atol=1e-5)
    assert (ours != reference).sum() <= 2  # ties in the last bit
    acc, acc_norm, acc_bytes = ours
    assert 0.2 < acc_norm.mean() < 0.3
    assert (acc != acc_norm).mean() > 0.1
    assert (acc_bytes != acc_norm).mean() > 0.05
    whole.save("hella.npz", losses)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: 10**9)
        whole.save("earlier.npz", losses)
    assert filecmp.cmp("hella.npz", "earlier.npz", shallow=False)
    saved = dict(np.load("hella.npz"))
    assert {name: array.dtype for name, array in saved.items()} == {
        "losses": np.float32, "tokens": np.int32, "bytes": np.int32, "labels": np.int64}
    np.testing.assert_allclose(saved.pop("losses"), arrays["losses"], rtol=1e-4)
    for name, array in saved.items():
        np.testing.assert_array_equal(array, arrays[name], name)
    for batch_tokens in 1, 500, 10**6:
        assert (answers(scorer(items[:100], batch_tokens), model) == reference[:, :100]).all()
    # the batches of a compiled model, not compiled: few shapes, one for each width
    fixed = scorer(items[:100], 2048, compile=True)
    shapes = {tuple(batch.shape) for batch, _ in fixed.batches}
    assert all(width % 64 == 0 for _, width in shapes)
    assert len(shapes) == len({width for _, width in shapes})
    assert (answers(fixed, model) == reference[:, :100]).all()
    # negative control
    spoiled = [{**item, "ctx": item["endings"][0]} for item in items[:100]]
    assert (answers(scorer(spoiled), model) != reference[:, :100]).any()


@pytest.mark.parametrize("compile", [False, True])
def test_a_scorer_scores_one_model_after_another(compile):
    """The second model gets its own scores, not those of its head on the first one's hidden states."""
    items = [{"ctx": f"item {i}", "endings": ["a", "bc", "def", "ghij"], "label": i % 4} for i in range(8)]

    def scorer():
        return hellaswag.HellaSwag(items, byte_tokenizer(), 64, 256, cpu_world(), compile)

    first, second = (small_model("gpt2", seed) for seed in (0, 1))
    expected = [scorer().losses(model) for model in (first, second)]
    assert (expected[0] - expected[1]).abs().max() > 0.1
    same = scorer()
    for model, losses in zip((first, second), expected):
        assert torch.equal(same.losses(model), losses)


def test_hellaswag_is_split_over_processes(gpt2_bpe, hellaswag_items, monkeypatch):
    model = small_model("gpt2", block_size=192)

    def scorer(rank=0, size=1):
        return hellaswag.HellaSwag(hellaswag_items[:40], Reduced(gpt2_bpe), 192, 1024, cpu_world(rank, size))

    whole = answers(scorer(), model)
    parts = []

    def collect(self, x):
        parts.append(x.clone())
        return x

    monkeypatch.setattr(common.World, "sum", collect)
    scorers = [scorer(rank, 3) for rank in range(3)]
    for part in scorers:
        part.losses(model)
    assert sum(len(part.batches) for part in scorers) > 3
    monkeypatch.setattr(common.World, "sum", lambda self, x: sum(parts))
    assert (answers(scorers[0], model) == whole).all()


def test_hellaswag_items_longer_than_the_context_lose_its_start():
    model = small_model("gpt2", vocab_size=256, block_size=24)
    rng = np.random.default_rng(0)

    def word(n):
        return "".join(map(chr, rng.integers(97, 123, n)))

    def score(items):
        return answers(hellaswag.HellaSwag(items, byte_tokenizer(), 24, 480, cpu_world()), model)

    items = [{"ctx": word(40), "endings": [word(9) for _ in range(4)], "label": 0} for _ in range(60)]
    cut = [{**item, "ctx": item["ctx"][-14:]} for item in items]  # 14 + space + 9 = 24
    assert (score(items) == one_at_a_time(model, cut, byte_tokenizer().encode_ordinary)[0]).all()
    score([{**items[0], "ctx": "a", "endings": [word(n) for n in (1, 23, 24, 60)]}])
    blank = [{**item, "ctx": " "} for item in items]  # the first token has nothing that it follows
    assert (score(blank) == one_at_a_time(model, blank, byte_tokenizer().encode_ordinary)[0]).all()


@pytest.mark.parametrize("line, word", [
    ('{"ctx": "a", "endings": ["b", "c", "d"], "label": 0}', "line 2"),
    ('{"ctx": "a", "endings": ["b", "c", "d", "e"]}', "line 2"),
    ('{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 4}', "line 2"),
    ("not json", "line 2"),
    ("[]", "line 2"),
    ('{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": Infinity}', "line 2"),
    ('{"ctx": 3, "endings": ["b", "c", "d", "e"], "label": 1}', "line 2"),
    ('{"ctx": "a", "endings": "bcde", "label": 1', "line 2"),
])
def test_a_malformed_hellaswag_file_names_the_line(line, word, monkeypatch, capsys):
    good = '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 3}\n'
    overwrite("h.jsonl", (good + line + "\n" + good).encode())

    def attempt(file):
        train("gpt2", monkeypatch, *QUICK, "--hella_limit=3", f"--hellaswag_file={file}")

    bad(capsys, lambda: attempt("h.jsonl"), "h.jsonl", word)
    bad(capsys, lambda: attempt("missing.jsonl"), "missing.jsonl")
    assert not os.path.exists("log")


class Files(Answer):
    """Sends the files of a dict {path: bytes}; of /short it leaves the last bytes out."""

    files = {}

    def do_GET(self):
        data = self.files.get(self.path, b"")
        self.send_response(200 if data else 404)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:-5] if self.path == "/short" else data)


def test_hellaswag_is_fetched_whole_or_not_at_all(monkeypatch, capsys):
    data = b'{"ctx": "a man", "endings": ["eats", "sits", "runs", "sees"], "label": 3}\n' * 6
    monkeypatch.setattr(Files, "files", {"/good": data, "/other": data[:-1] + b" ", "/short": data})
    monkeypatch.setattr(hellaswag, "SIZE", len(data))
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(data).hexdigest())
    with serve(Files) as url:
        for path in "/missing", "/other", "/short":
            monkeypatch.setattr(hellaswag, "URL", url + path)
            with pytest.raises(OSError):
                hellaswag.download()
            assert os.listdir() == []
        # a run without HellaSwag says so once and trains
        train("gpt2", monkeypatch, *QUICK, "--hella_limit=10")
        assert capsys.readouterr().err.count("no HellaSwag") == 1
        assert b"hella" not in log_of()
        monkeypatch.setattr(hellaswag, "URL", url + "/good")
        train("gpt2", monkeypatch, *QUICK, "--hella_limit=10", "--log_dir=log/b")
    with open(hellaswag.FILE, "rb") as f:
        assert f.read() == data
    assert sorted(os.listdir()) == [hellaswag.FILE, "log", "tiny_data"]
    assert re.findall(r"^(\d+) hella [01]\.\d{4}$", log_of("log/b").decode(), re.M) == ["0", "4", "8"]
    assert np.load("log/b/hella_8.npz")["losses"].shape == (6, 4)


# ---- runs ------------------------------------------------------------------------------------------------------------

def run_of(folder):
    """Return a run's run.json as a dict."""
    with open(f"{folder}/run.json") as f:
        return json.load(f)


def checkpoints(folder="log/gpt2-tiny"):
    """Return the paths of a run's checkpoints, the oldest first."""
    return sorted(glob.glob(f"{folder}/model_*.pt"))


@each_trained
def test_a_tiny_run_from_the_shell(arch, monkeypatch, capsys):
    """A short version of the first command in the README does everything that the README promises."""
    folder = f"log/{arch}-tiny"
    result = shell(f"train_{arch}.py", "--tiny", "--max_steps=60", "--eval_interval=30", "--sample_interval=60",
                   "--checkpoint_interval=0", "--val_tokens=8192")
    assert result.returncode == 0, result.stderr
    train_loss = stream_of("train", folder)
    assert len(train_loss) == 60
    assert abs(train_loss[0] - math.log(320)) < 0.3
    assert train_loss[-1] < 3.3
    val = stream_of("val", folder)
    assert val[2] < val[1] < val[0]
    for line in log_of(folder).decode().splitlines():
        assert re.fullmatch(r"\d+ (train|val|bpb|val_full|bpb_full|lr|norm|maxvio) \S+", line)
    for words in "sample: ", f"log: {folder}/log.txt", "checkpoint: ", "next: python ":
        assert words in result.stdout
    info = run_of(folder)
    assert info["arch"] == arch
    assert info["config"]["max_steps"] == 60
    assert info["params"]["total"] > 0
    assert info["flops_per_token"] > 0
    script, *options = re.search(r"next: python (.*) --sample", result.stdout)[1].split()
    assert script == f"train_{arch}.py"
    samples = []
    for _ in range(2):
        train(arch, monkeypatch, *options, "--sample=The statement", "--seed=1")
        samples.append(capsys.readouterr().out)
    assert samples[0].startswith("The statement")
    assert len(samples[0]) > 50
    assert samples[1] == samples[0]


@pytest.mark.parametrize("arch", ["gpt2", "deepseek"])
def test_resume_is_exact(arch, monkeypatch, capsys):
    """Interrupted after any step and resumed, a run ends with the same log and the same weights."""
    train(arch, monkeypatch, *quick(arch), "--log_dir=log/whole")
    whole = checkpoint_of("log/whole")
    for stop in 2, 6:
        folder = f"log/{stop}"
        train(arch, monkeypatch, *quick(arch), f"--log_dir={folder}")
        for path in checkpoints(folder):
            if path > f"{folder}/model_{stop:05d}.pt":
                os.remove(path)
        with open(f"{folder}/log.txt", "a") as f:
            f.write("9 tra")  # torn by a kill
        train(arch, monkeypatch, *quick(arch), f"--log_dir={folder}", "--resume=auto")
        assert f"resumed {folder}/model_{stop:05d}.pt at step {stop}" in capsys.readouterr().out
        assert log_of(folder) == log_of("log/whole")
        again = checkpoint_of(folder)
        for name, p in whole["model"].items():
            assert torch.equal(p, again["model"][name]), name
        for i, state in whole["optimizer"]["state"].items():
            for name, value in state.items():
                assert torch.equal(value, again["optimizer"]["state"][i][name])
    assert not any("_orig_mod" in name or name.startswith("module.") for name in whole["model"])
    # a finished run does not change
    train(arch, monkeypatch, *quick(arch), "--log_dir=log/whole", "--resume=auto")
    assert log_of("log/whole") == log_of("log/6")
    # another option is said, and used
    train(arch, monkeypatch, *quick(arch), "--log_dir=log/decay", "--resume=log/whole/model_00004.pt",
          "--weight_decay=9", "--optimizer=adamw")
    assert "weight_decay 0.1 -> 9.0" in capsys.readouterr().out
    assert checkpoint_of("log/decay")["optimizer"]["param_groups"][0]["weight_decay"] == 9.0
    assert stream_of("train", "log/decay")[0] == stream_of("train", "log/whole")[4]


KILLED_WHILE_SAVING = """
import os, signal, sys, torch, train_gpt2
save = torch.save

def dying(state, f):
    save(state, f)
    if state["step"] == 6:
        f.flush()
        f.truncate(1000)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = dying
train_gpt2.main()
"""


def test_killed_in_the_middle_of_a_save(monkeypatch):
    """After kill -9 while the checkpoint of step 6 is half written, the one of step 4 counts, and the log ends the
    same."""
    train("gpt2", monkeypatch, *QUICK, "--log_dir=log/whole")
    env = {**os.environ, "PYTHONPATH": ROOT}
    result = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, *QUICK], env=env, capture_output=True)
    assert result.returncode == -signal.SIGKILL
    assert glob.glob("log/gpt2-tiny/model_00006.pt.*.tmp")
    assert not os.path.exists("log/gpt2-tiny/model_00006.pt")
    train("gpt2", monkeypatch, *QUICK, "--resume=auto")
    assert log_of() == log_of("log/whole")
    assert not glob.glob("log/gpt2-tiny/*.tmp")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_interrupted_and_resumed(signum, monkeypatch):
    """SIGTERM and SIGINT finish the step and save; nothing saves on SIGKILL, which loses steps, never the result."""
    options = [*QUICK, "--max_steps=100", "--checkpoint_interval=20", "--eval_interval=50"]
    command = [sys.executable, os.path.join(ROOT, "train_gpt2.py"), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step    30/"):
            process.send_signal(signum)
            break
    rest = process.stdout.read()
    newest = max(checkpoints())
    if signum == signal.SIGKILL:
        assert process.wait() == -signum
        assert newest.endswith("00020.pt")
    else:
        assert process.wait() == 0
        assert newest > "log/gpt2-tiny/model_00030.pt"
        assert f"stopped; {newest} holds everything" in rest
    train("gpt2", monkeypatch, *options, "--resume=auto")
    train("gpt2", monkeypatch, *options, "--log_dir=log/whole")
    assert log_of() == log_of("log/whole")


LONG = [*QUICK, "--max_steps=100000", "--eval_interval=0", "--checkpoint_interval=0"]


def stopped_at(folder="log/gpt2-tiny"):
    """Return the step at which a run stopped and saved; there must be one checkpoint."""
    (path,) = checkpoints(folder)
    return int(re.search(r"(\d+)\.pt$", path)[1])


@pytest.mark.parametrize("command", ["nohup sh -c", "sh -c"])
def test_a_hangup_saves(command):
    """SIGHUP, which comes when the terminal goes, stops and saves; nohup lets the run go on."""
    start = shlex.join([sys.executable, os.path.join(ROOT, "train_gpt2.py"), *LONG])
    process = subprocess.Popen([*command.split(), f"exec {start}"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if line.startswith("step    30/"):
            process.send_signal(signal.SIGHUP)
        if line.startswith("step   200/"):
            assert "nohup" in command
            process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    assert stopped_at() > 200 if "nohup" in command else 30 < stopped_at() < 200


def test_a_hangup_of_torchrun_saves():
    """torchrun handles SIGHUP itself, so nohup does not help there: it passes the signal on to its workers."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               os.path.join(ROOT, "train_gpt2.py"), *LONG]
    process = subprocess.Popen(["nohup", *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if line.startswith("step    30/"):
            process.send_signal(signal.SIGHUP)
    process.wait()
    assert stopped_at() > 30


def test_a_closed_console_saves():
    """The reader of a pipe, such as `head` or a `tee` that was killed, may go before the run does."""
    command = [sys.executable, os.path.join(ROOT, "train_gpt2.py"), *LONG]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step    30/"):
            break
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
    assert stopped_at() > 30


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("what", ["val", "hella"])
def test_a_signal_ends_an_evaluation(what, processes, hellaswag_path, monkeypatch):
    """SIGTERM during an evaluation of minutes gives it up and saves within seconds. Resumed, the run ends with the log
    of an uninterrupted one."""
    shards("data", n_val=4_000_000)
    long = ["--val_tokens=4000000"]
    if what == "hella":
        long = [f"--hellaswag_file={hellaswag_path}", "--hella_limit=10042", "--batch_size=1"]
    options = [*QUICK, "--data_dir=data", "--eval_interval=3"]
    command = [sys.executable, os.path.join(ROOT, "train_gpt2.py")]
    if processes == 2:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    train("gpt2", monkeypatch, *options, "--max_steps=3")
    for name in "model_00003.pt", "log.txt":
        os.rename(f"log/gpt2-tiny/{name}", f"log/{name}")
    shutil.rmtree("log/gpt2-tiny")
    os.makedirs("log/gpt2-tiny")
    for name in "model_00003.pt", "log.txt":  # it resumes where an evaluation is due
        os.rename(f"log/{name}", f"log/gpt2-tiny/{name}")
    process = subprocess.Popen([*command, *options, *long, "--resume=auto"], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("gpt2: " if what == "val" else "step     3 | validation"):
            time.sleep(1)  # the evaluation begins
            process.send_signal(signal.SIGTERM)
            begin = time.monotonic()
    process.wait()
    assert time.monotonic() - begin < 10
    assert f"3 {what} " not in log_of().decode()
    assert stopped_at() == 3
    train("gpt2", monkeypatch, *options, "--resume=auto")
    train("gpt2", monkeypatch, *options, "--log_dir=log/whole")
    assert log_of() == log_of("log/whole")


def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint():
    """torchrun --max_restarts starts all workers again after one died; with --resume=auto the log is the same."""
    options = [*QUICK, "--max_steps=40", "--checkpoint_interval=10", "--resume=auto"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=3",
               os.path.join(ROOT, "train_gpt2.py"), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    killed = False
    resumed = []
    for line in process.stdout:
        if line.startswith("step    25/") and not killed:
            killed = True
            with open(f"/proc/{process.pid}/task/{process.pid}/children") as f:
                os.kill(int(f.read().split()[-1]), signal.SIGKILL)
        if line.startswith("resumed "):
            resumed.append(line)
    assert process.wait() == 0, process.stderr.read()
    assert len(resumed) == 1 and "at step 20" in resumed[0], process.stderr.read()
    result = shell("train_gpt2.py", *options, "--log_dir=log/whole", processes=2)
    assert result.returncode == 0, result.stderr
    assert log_of() == log_of("log/whole")


@pytest.mark.parametrize("has_triton", [True, False])
def test_windows_has_no_triton(has_triton):
    """There a GPU does not make torch.compile the default."""
    code = f"""
import importlib.util, torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda gpu: (9, 0)
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: {has_triton or None} if name == "triton" else find_spec(name)
import common
print(common.RunConfig.device, common.RunConfig.compile)"""
    result = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True,
                            text=True)
    assert result.stdout == f"cuda {has_triton}\n", result.stderr


def test_what_comes_instead_of_a_tokenizer(monkeypatch, capsys):
    """A network that asks for a login answers with a page: tiktoken raises ValueError."""
    import tiktoken

    def download(name):
        raise ValueError("Hash mismatch for data downloaded")

    monkeypatch.setattr(tiktoken, "get_encoding", download)
    assert fineweb.get_tokenizer("", 50304) is None
    assert "cannot be downloaded (ValueError)" in capsys.readouterr().err


def test_ctrl_c_answers_at_once(monkeypatch, capfd):
    log_train = run.Run.log_train

    def interrupted(self, step, *args):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        log_train(self, step, *args)

    monkeypatch.setattr(run.Run, "log_train", interrupted)
    train("gpt2", monkeypatch, *QUICK)
    assert "stopping after this step; press Ctrl-C again to stop at once" in capfd.readouterr().err
    assert len(stream_of("train", "log/gpt2-tiny")) == 4


def test_ctrl_c_saves_though_it_ends_the_reader_of_both_streams(monkeypatch):
    """As with `2>&1 | tee`, which Ctrl-C ends, too: writing to it raises BrokenPipeError."""
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "train_gpt2.py"), *LONG], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step    30/"):
            break
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    assert stopped_at() > 30


def test_a_checkpoint_saved_while_waiting_for_the_lock_is_resumed(monkeypatch, capsys):
    train("gpt2", monkeypatch, *QUICK)
    newest = max(checkpoints())
    os.rename(newest, "newest.pt")
    lock_folder = fineweb.lock_folder

    def saved_meanwhile(folder, option):
        os.rename("newest.pt", newest)
        return lock_folder(folder, option)

    monkeypatch.setattr(fineweb, "lock_folder", saved_meanwhile)
    train("gpt2", monkeypatch, *QUICK, "--resume=auto")
    assert f"resumed {newest}" in capsys.readouterr().out


@pytest.mark.parametrize("difference, says", [
    ("option", "differ in their options"),
    ("shards", "differ in the train shards in "),
    ("tokenizer", "differ in whether they have a tokenizer"),
    ("hellaswag", "differ in HellaSwag's items")])
def test_processes_that_differ_are_noticed(difference, says, hellaswag_items):
    """Two processes as on two machines, one of which lacks something."""
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        _, port = s.getsockname()
    processes = []
    for rank in range(2):
        shards(f"machine{rank}")
        if rank == 1 and difference == "shards":
            os.remove(max(glob.glob(f"machine{rank}/*train*")))
        if rank == 1 and difference == "tokenizer":
            os.remove(f"machine{rank}/vocab.tiktoken")
        write_jsonl(f"machine{rank}.jsonl", hellaswag_items[:4 - (rank == 1 and difference == "hellaswag")])
        options = [*QUICK, "--vocab_size=320", f"--data_dir=machine{rank}", f"--hellaswag_file=machine{rank}.jsonl",
                   "--hella_limit=4", "--val_full_tokens=0"]
        if rank == 1 and difference == "option":
            options.append("--learning_rate=2e-3")
        environment = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port)}
        processes.append(subprocess.Popen(
            [sys.executable, os.path.join(ROOT, "train_gpt2.py"), *options], env=os.environ | environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [1, 1], outputs
    assert any(says in stderr for _, stderr in outputs), outputs
    assert not os.path.exists("log/gpt2-tiny/log.txt")


def test_one_writer_per_run(monkeypatch, capsys):
    """The second of two runs in a folder ends at once and names the first; after kill -9 there is nothing to clean."""
    command = [sys.executable, os.path.join(ROOT, "train_gpt2.py"), *LONG, "--checkpoint_interval=5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step    10/"):
            break
    log = log_of()
    for options in [], ["--resume=auto"], ["--resume=auto", "--seed=2"]:
        bad(capsys, lambda: train("gpt2", monkeypatch, *LONG, *options), "log/gpt2-tiny", f"PID {process.pid} ")
    assert log_of().startswith(log)
    assert run_of("log/gpt2-tiny")["config"]["seed"] == 1337
    process.kill()
    process.wait()
    steps = max(map(int, re.findall(r"^(\d+) train", log_of().decode(), re.M)))
    train("gpt2", monkeypatch, *QUICK, f"--max_steps={steps + 2}", "--eval_interval=0", "--resume=auto")


def test_history_is_kept(monkeypatch, capsys):
    """run.json has an entry for each start, and one of a version that only described the latest start is continued."""
    train("gpt2", monkeypatch, *QUICK, "--max_steps=4")
    train("gpt2", monkeypatch, *QUICK, "--resume=auto")
    train("gpt2", monkeypatch, *QUICK, "--max_steps=10", "--learning_rate=1e-4", "--resume=auto")
    info = run_of("log/gpt2-tiny")
    assert [start["step"] for start in info["starts"]] == [0, 4, 8]
    assert [start["config"]["max_steps"] for start in info["starts"]] == [4, 8, 10]
    assert [start["config"]["learning_rate"] for start in info["starts"]] == [3e-3, 3e-3, 1e-4]
    assert info["config"] == info["starts"][-1]["config"]
    assert info["command"] == sys.argv
    starts = info.pop("starts")
    overwrite("log/gpt2-tiny/run.json", json.dumps(info).encode())
    train("gpt2", monkeypatch, *QUICK, "--max_steps=12", "--resume=auto")
    first, second = run_of("log/gpt2-tiny")["starts"]
    assert first == starts[-1] | {"step": 0}
    assert second["step"] == 10
    options = [*QUICK, "--max_steps=12", "--resume=auto"]
    for damage in b"{", b"[1]", b"3":
        overwrite("log/gpt2-tiny/run.json", damage)
        bad(capsys, lambda: train("gpt2", monkeypatch, *options), "run.json is damaged")


def test_a_step_keeps_its_number_of_tokens(monkeypatch, capsys):
    """Otherwise a resumed run would go on at another place in the data."""
    train("gpt2", monkeypatch, *QUICK)
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK, "--resume=auto", "--total_batch_size=2048"),
        "--total_batch_size=512")


def test_a_log_with_other_line_endings_is_read(monkeypatch, capsys):
    """Git and editors on Windows write CRLF. A log with lines of another kind is refused, not shortened."""
    train("gpt2", monkeypatch, *QUICK)
    log = log_of()
    overwrite("log/gpt2-tiny/log.txt", log.replace(b"\n", b"\r\n"))
    train("gpt2", monkeypatch, *QUICK, "--resume=auto")
    assert log_of() == log
    for line in b"step 3: loss 2.1\n", b"\n", b"3 train\n", b"\xff\xfe\n", b"3 train 2.1 2.2\n":
        foreign = log + line + b"8 val 2.0\n"
        overwrite("log/gpt2-tiny/log.txt", foreign)
        number = log.count(b"\n") + 1
        bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK, "--resume=auto"), "log.txt", f"line {number} ")
        assert log_of() == foreign


def test_a_finished_run_keeps_its_hellaswag(monkeypatch, hellaswag_path):
    options = [*QUICK, f"--hellaswag_file={hellaswag_path}"]
    train("gpt2", monkeypatch, *options, "--hella_limit=20")
    log = log_of()
    assert b"\n8 hella " in log
    train("gpt2", monkeypatch, *options, "--hella_limit=20", f"--resume={checkpoints()[0]}", "--log_dir=log/resumed")
    assert filecmp.cmp("log/gpt2-tiny/hella_8.npz", "log/resumed/hella_8.npz", shallow=False)
    train("gpt2", monkeypatch, *options, "--hella_limit=0", "--resume=auto")
    assert sorted(log_of().split(b"\n")) == sorted(log.split(b"\n"))
    train("gpt2", monkeypatch, *options, "--hella_limit=0", "--max_steps=9", "--eval_interval=100", "--resume=auto")
    assert b"\n8 hella " in log_of()
    assert b"\n8 val " in log_of()


def test_the_full_validation_set_comes_last(monkeypatch):
    """Its loss is that on all tokens; `val` is that on the first ones."""
    shards("data", n_val=5000)
    options = [*QUICK, "--data_dir=data", "--val_tokens=1024", "--val_full_tokens=4096"]
    train("gpt2", monkeypatch, *options)
    assert re.findall(r"^(\d+) val_full", log_of().decode(), re.M) == ["8"]
    train("gpt2", monkeypatch, *options, "--val_tokens=4096", "--val_full_tokens=0", "--log_dir=log/b")
    assert stream_of("val_full", "log/gpt2-tiny")[-1] == stream_of("val", "log/b")[-1]
    assert stream_of("val", "log/gpt2-tiny")[-1] != stream_of("val", "log/b")[-1]
    assert not len(stream_of("val_full", "log/b"))


# ---- precision -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("capabilities, dtype", [
    ([(9, 0)], "bfloat16"), ([(8, 0)], "bfloat16"), ([(8, 9)], "bfloat16"), ([(7, 5)], "float16"),
    ([(7, 0)], "float16"), ([(8, 0), (7, 5)], "float16"), ([], "float32")])
def test_the_default_precision_is_that_of_the_gpus(capabilities, dtype, monkeypatch):
    """bfloat16 needs an A100, an RTX 30 or newer; a T4, a V100 and an RTX 20 take float16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capabilities[gpu])
    assert common.default_dtype("cuda") == dtype
    assert common.default_dtype("cpu") == "float32"


@each_trained
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_trains_alike(arch, dtype, monkeypatch):
    options = [*quick(arch), "--max_steps=16", "--warmup_steps=4"]
    train(arch, monkeypatch, *options, "--log_dir=log/float32")
    train(arch, monkeypatch, *options, f"--dtype={dtype}", "--log_dir=log/low")
    assert (checkpoint_of("log/low", step=16)["scaler"] != {}) == (dtype == "float16")
    for stream in "train", "val":
        low, high = stream_of(stream, "log/low"), stream_of(stream, "log/float32")
        np.testing.assert_allclose(low, high, rtol=0.01)
    # the first updates, because rounding grows from one to the next
    low, high = stream_of("norm", "log/low")[:8], stream_of("norm", "log/float32")[:8]
    np.testing.assert_allclose(low, high, rtol=0.1)  # not scaled as the loss is
    assert not np.array_equal(low, high)


@pytest.mark.parametrize("options", [["gpt2"], ["gpt2", "--optimizer=muon"], ["rwkv"], ["deepseek"]])
def test_a_skipped_update_is_logged_and_resumed(options, monkeypatch):
    """A scale that is too high makes gradients overflow: the update is skipped, the scale halved. The checkpoint keeps
    the scale, so that a resumed run is the same."""
    arch, *more = options
    init = torch.amp.GradScaler.__init__
    monkeypatch.setattr(torch.amp.GradScaler, "__init__",
                        lambda self, *args, **kwargs: init(self, *args, **kwargs, init_scale=2.0**36))
    options = [*quick(arch), *more, "--dtype=float16", "--max_steps=40", "--checkpoint_interval=4"]
    train(arch, monkeypatch, *options, "--log_dir=log/whole")
    lines = log_of("log/whole").decode().splitlines()
    skipped = [int(line.split()[0]) for line in lines if line.endswith(" skipped 1")]
    assert skipped[:10] == list(range(10)) and len(skipped) < 30
    assert np.isfinite(stream_of("train", "log/whole")).all()
    assert stream_of("val", "log/whole")[-1] < stream_of("val", "log/whole")[0]
    os.makedirs("log/resumed")
    shutil.copy("log/whole/log.txt", "log/resumed")
    shutil.copy("log/whole/model_00008.pt", "log/resumed")
    train(arch, monkeypatch, *options, "--log_dir=log/resumed", "--resume=auto")
    assert log_of("log/resumed") == log_of("log/whole")
    # negative control: without the state of the scaler the resumed run starts with the first scale again
    checkpoint = checkpoint_of("log/whole", step=8)
    os.makedirs("log/other")
    torch.save(checkpoint | {"scaler": {}}, "log/other/model_00008.pt")
    train(arch, monkeypatch, *options, "--log_dir=log/other", "--resume=auto")
    assert not log_of("log/whole").endswith(log_of("log/other"))


@pytest.mark.parametrize("signal_in_step", [None, 3, 7])
def test_numbers_that_are_read_late(signal_in_step, monkeypatch, capsys):
    """On a GPU an update is logged while the next one runs. The log is the same, and a signal in any step, the last
    one included, ends in a message that is true: resumed, the run ends with the log of an uninterrupted one."""
    train("gpt2", monkeypatch, *QUICK, "--log_dir=log/whole")
    begin_update = run.Run.begin_update
    updates = []

    def late(self):
        self.lag = 1
        begin_update(self)
        updates.append(len(self.pending))
        if len(updates) - 1 == signal_in_step:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "begin_update", late)
        train("gpt2", patch, *QUICK)
    assert 1 in updates  # something was pending
    stopped = "stopped; " in capsys.readouterr().out
    assert stopped == (signal_in_step is not None)
    if stopped:
        assert len(stream_of("val", "log/gpt2-tiny")) < len(stream_of("val", "log/whole"))
        train("gpt2", monkeypatch, *QUICK, "--resume=auto")
    assert log_of() == log_of("log/whole")


def test_a_checkpoint_does_not_depend_on_the_order_of_options(monkeypatch, capsys):
    """A version of the script with other options, or the same ones in another order, can read it."""
    train("gpt2", monkeypatch, *QUICK, "--log_dir=log/whole")
    checkpoint = checkpoint_of("log/whole", step=4)
    config = dict(reversed(checkpoint["config"].items()))
    del config["keep_checkpoints"]  # an option that came later
    torch.save({**checkpoint, "config": config}, "older.pt")
    train("gpt2", monkeypatch, *QUICK, "--resume=older.pt", "--max_steps=6")
    out = capsys.readouterr().out
    assert "resumed older.pt at step 4" in out
    assert "max_steps 8 -> 6" in out
    config["n_layer"] = 2
    torch.save({**checkpoint, "config": config}, "other.pt")
    options = [*QUICK, "--resume=other.pt", "--log_dir=log/other"]
    bad(capsys, lambda: train("gpt2", monkeypatch, *options), "another shape", "--n_layer=2")


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA A100 80GB PCIe", 312e12),
    ("NVIDIA RTX A1000 Laptop GPU", None),
    ("NVIDIA RTX A1000", None),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ("NVIDIA H100 80GB HBM3", 989.4e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H200", 989.4e12),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA GH200 480GB", 989.4e12),
    ("NVIDIA GeForce RTX 4090", 165.2e12),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA GeForce RTX 4090 D", None),
    ("NVIDIA GeForce RTX 3090 Ti", None),
    ("cpu", None),
])
def test_the_peak_is_that_of_the_device(name, peak):
    assert common.peak_flops(name) == peak


@each_trained
def test_processes_and_micro_batches_do_not_change_the_result(arch, monkeypatch):
    """1 process x 16 rows, 1 x 2 with accumulation and 2 x 2 with accumulation end the same; so does a run that resumes
    with another number of processes."""
    shards("data")
    options = [*quick(arch), "--data_dir=data", "--hella_limit=0"]
    train(arch, monkeypatch, *options, "--batch_size=16", "--log_dir=log/a")
    train(arch, monkeypatch, *options, "--batch_size=2", "--log_dir=log/b")
    result = shell(f"train_{arch}.py", *options, "--batch_size=2", "--log_dir=log/c", processes=2)
    assert result.returncode == 0 and "Warning" not in result.stderr, result.stderr
    os.makedirs("log/d")
    os.link("log/c/model_00004.pt", "log/d/model_00004.pt")
    train(arch, monkeypatch, *options, "--batch_size=8", "--log_dir=log/d", "--resume=auto")
    weights = checkpoint_of("log/a")["model"]
    for other in "log/b", "log/c", "log/d":
        for stream, tolerance in ("train", 1e-5), ("val", 1e-4), ("norm", 1e-4):
            ours = stream_of(stream, other)
            expected = stream_of(stream, "log/a")[-len(ours):]  # the resumed run has the later steps
            np.testing.assert_allclose(ours, expected, rtol=tolerance)
        assert (stream_of("maxvio", "log/a")[-4:] == stream_of("maxvio", other)[-4:]).all()
        other_weights = checkpoint_of(other)["model"]
        for name, bias in weights.items():
            if name.endswith("correction_bias"):
                assert bias.any()
                assert torch.equal(bias, other_weights[name])


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are listed in Linux's /proc")
def test_the_process_group_ends_with_the_run(tmp_path):
    """Its threads must be gone before the interpreter is: one that still held a tensor aborted a finished run."""
    shards("data")
    script = tmp_path / "threads.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {ROOT!r})\nimport train_gpt2\ntrain_gpt2.main()\n"
        "from contextlib import suppress\n"
        "for thread in os.listdir('/proc/self/task'):\n"
        "    with suppress(OSError):  # it may end meanwhile\n"
        "        print(open(f'/proc/self/task/{thread}/comm').read(), file=sys.stderr)\n")
    result = shell(script, *quick("gpt2"), "--data_dir=data", "--hella_limit=0", "--max_steps=1", processes=2)
    assert result.returncode == 0 and "python" in result.stderr, result.stderr
    assert "gloo" not in result.stderr


def test_two_machines_train_as_one():
    """Two agents of torchrun that meet over the network leave the log of two processes of one machine."""
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        _, port = s.getsockname()
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
             f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1",
             os.path.join(ROOT, "train_gpt2.py"), *QUICK, "--log_dir=log/two"]
    agents = []
    for _ in range(2):
        agents.append(subprocess.Popen(agent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [process.communicate()[0] for process in agents]
    assert all(process.returncode == 0 for process in agents), outputs
    result = shell("train_gpt2.py", *QUICK, "--log_dir=log/one", processes=2)
    assert result.returncode == 0, result.stderr
    assert log_of("log/two") == log_of("log/one"), result.stderr
    assert run_of("log/two")["processes"] == 2


# MTA takes minutes to compile for a CPU; test_mta.py compiles it without generating code
@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch not in ("hybrid", "mta")])
def test_compiled_is_the_same(arch, monkeypatch, gpt2_bpe, hellaswag_items, capsys):
    """torch.compile on the CPU gives the same losses; HellaSwag, samples and saving work, and names stay clean."""
    write_jsonl("h.jsonl", hellaswag_items[:8])
    data = gpt2_bpe.encode_ordinary(" ".join(item["ctx"] for item in hellaswag_items[:300]))
    os.mkdir("data")
    fineweb.write_shard("data/x_val_000000.bin", data[:2000])
    fineweb.write_shard("data/x_train_000001.bin", data[2000:])
    options = [*quick(arch), "--data_dir=data", "--vocab_size=50304", "--block_size=64", "--hella_limit=8",
               "--hellaswag_file=h.jsonl", "--max_steps=4", "--eval_interval=2", "--sample_interval=2"]
    train(arch, monkeypatch, *options, "--log_dir=log/eager")
    train(arch, monkeypatch, *options, "--log_dir=log/compiled", "--compile")
    for stream in "train", "val", "hella":
        eager = stream_of(stream, "log/eager")
        assert len(eager) >= 3
        np.testing.assert_allclose(eager, stream_of(stream, "log/compiled"), rtol=1e-4)
    assert capsys.readouterr().out.count("sample: Hello") == 4
    names, compiled_names = (list(checkpoint_of(f"log/{run}", step=4)["model"]) for run in ("eager", "compiled"))
    assert names == compiled_names


@each_in_transformers
def test_export_opens_with_transformers(arch, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM
    train(arch, monkeypatch, *quick(arch))
    train(arch, monkeypatch, *quick(arch), "--export=exported")
    hf = AutoModelForCausalLM.from_pretrained("exported").eval()
    assert type(hf).__name__ == HF[arch]
    assert hf.config.eos_token_id == hf.generation_config.eos_token_id == 256  # <|endoftext|> after the bytes
    model = trained_model(arch)
    idx = tokens(2, 32, vocab=256)
    logits, _ = model(idx)
    torch.testing.assert_close(hf(idx).logits, logits, atol=1e-4, rtol=0)
    assert hf.generate(idx[:1, :5], max_new_tokens=5, do_sample=False).shape == (1, 10)
    bad(capsys, lambda: train(arch, monkeypatch, *quick(arch), "--export=exported"), "not empty")
    monkeypatch.setitem(sys.modules, "transformers", None)
    bad(capsys, lambda: train(arch, monkeypatch, *quick(arch), "--export=again"), "pip install -U transformers")


def is_one_line_error(result):
    """Tell whether a process of shell() ended with exit code 1 and one line on stderr."""
    return result.returncode == 1 and result.stderr.count("\n") == 1


def test_hellaswag_from_the_shell(monkeypatch, capsys, gpt2_bpe, hellaswag_items):
    write_jsonl("h.jsonl", hellaswag_items[:30])
    data = gpt2_bpe.encode_ordinary(" ".join(item["ctx"] for item in hellaswag_items[:50]))
    os.mkdir("data")
    for name in "x_val_000000.bin", "x_train_000001.bin":
        fineweb.write_shard(f"data/{name}", data)
    checkpoint = "log/gpt2-tiny/model_00008.pt"
    train("gpt2", monkeypatch, *QUICK, "--data_dir=data", "--vocab_size=50304", "--block_size=256", "--batch_size=1",
          "--hella_limit=30", "--hellaswag_file=h.jsonl")
    train("gpt2", monkeypatch, *QUICK, "--export=exported")
    # a checkpoint and its export score the same
    ours = shell("hellaswag.py", checkpoint, "--hellaswag_file=h.jsonl")
    theirs = shell("hellaswag.py", "exported", "--hellaswag_file=h.jsonl", "--save=exported.npz")
    assert ours.returncode == theirs.returncode == 0, ours.stderr + theirs.stderr
    assert ours.stdout.splitlines()[:3] == theirs.stdout.splitlines()[:3]
    printed = re.findall(r"^(acc\w*) +(0\.\d{4}) \+- 0\.\d{4}  \(\d+/30\)$", ours.stdout, re.M)
    assert [name for name, _ in printed] == ["acc", "acc_norm", "acc_bytes"]
    assert float(printed[1][1]) == stream_of("hella", "log/gpt2-tiny")[-1]
    # and the run has kept what all three scores follow from
    saved = np.load("log/gpt2-tiny/hella_8.npz")
    for (_, score), divisor in zip(printed, (1, saved["tokens"], saved["bytes"])):
        assert score == f"{np.mean((saved['losses'] / divisor).argmin(1) == saved['labels']):.4f}"
    assert "items/s" in ours.stdout
    for name, digits in ("bpb", 4), ("gap", 5):
        value = re.search(rf"^{name} +(-?\d\.\d{{{digits}}}) \+- \d\.\d+$", ours.stdout, re.M)[1]
        assert float(value) == stream_of(f"hella_{name}", "log/gpt2-tiny")[-1]
    # --save keeps the same of any model, and compare.py takes it
    external = np.load("exported.npz")
    for name in "tokens", "bytes", "labels":
        np.testing.assert_array_equal(external[name], saved[name])
    np.testing.assert_allclose(external["losses"], saved["losses"], rtol=1e-4)
    compared = shell("compare.py", "log/gpt2-tiny", "exported.npz")
    assert re.search(r"^\| exported \| +- .*HellaSwag only", compared.stdout, re.M), compared.stderr
    # what cannot be written is said before the model is loaded
    os.mkdir("folder.npz")
    for options in ["x"], [""], ["h.jsonl/x.npz"], ["folder.npz"], ["x.npz", "--style=lm-eval"]:
        options[0] = f"--save={options[0]}"
        monkeypatch.setattr(sys, "argv", ["hellaswag.py", "no_model", "--hellaswag_file=h.jsonl", *options])
        bad(capsys, hellaswag.main, "--save")
    # the style of lm-eval needs the fields of the original file
    with open("h.jsonl") as f:
        items = [json.loads(line) for line in f]
    fields = [{**item, "activity_label": "Doing", "ctx_a": item["ctx"], "ctx_b": ""} for item in items]
    write_jsonl("raw.jsonl", fields)
    ours = shell("hellaswag.py", "exported", "--hellaswag_file=raw.jsonl", "--style=lm-eval")
    assert ours.returncode == 0
    assert "/30)" in ours.stdout
    lacking = shell("hellaswag.py", checkpoint, "--hellaswag_file=h.jsonl", "--style=lm-eval")
    assert is_one_line_error(lacking)
    assert "line 1" in lacking.stderr
    assert "ctx_a" in lacking.stderr
    for name in "nothing.pt", "h.jsonl":
        monkeypatch.setattr(sys, "argv", ["hellaswag.py", name, "--hellaswag_file=h.jsonl"])
        bad(capsys, hellaswag.main, name)


def lm_eval_items(path, n=600):
    """Return real items with the fields of the original file; a copy that has the context in one piece is cut into two
    at its last sentence. Every sixth item gets WikiHow's markers, which a copy may lack."""
    with (lzma.open if path.endswith(".xz") else open)(path, "rb") as f:
        lines = f.readlines()
    items = [json.loads(line) for line in lines[::10042 // n][:n]]
    for i, item in enumerate(items):
        if "ctx_a" not in item:
            first, dot, last = item["ctx"].rpartition(". ")
            item["ctx_a"] = first + dot.strip()
            item["ctx_b"] = last
        if i % 6 == 0:
            item["ctx_a"] = "[header] " + item["ctx_a"].replace(". ", " [title] ", 1)
            item["ctx_b"] += (" [step]", "  [substeps] ", " [title]")[i % 18 // 6]
            ending = item["endings"][i % 4].replace(" ", "  ", 2)
            item["endings"][i % 4] = f" [header] {ending} [title] " + "\u2014" * 8 + " [step]."
    return items


# the harness's own task, on a local file
LOCAL_TASK = """\
include: {folder}/tasks/hellaswag/hellaswag.yaml
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
training_split: null
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: acc_bytes}}]
"""


def test_lm_eval_style_equals_the_harness(gpt2_bpe, hellaswag_path):
    """lm-evaluation-harness, run on the export of a random model, finds the same likelihoods and answers for 600 real
    items."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from tiktoken.load import read_file_cached
    from transformers import GPT2TokenizerFast

    class Folded(HFLM):
        """Folds the vocabulary as Reduced does."""

        def tok_encode(self, *args, **options):
            return [token % Reduced.n_vocab for token in super().tok_encode(*args, **options)]

    os.mkdir("tokenizer")
    for name, file in ("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe"):
        data = read_file_cached(f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{file}")
        overwrite(f"tokenizer/{name}", data)
    names = "ctx", "activity_label", "ctx_a", "ctx_b", "endings", "label"
    write_jsonl("items.jsonl", [{name: item[name] for name in names} for item in lm_eval_items(hellaswag_path)])
    os.mkdir("tasks")
    task = LOCAL_TASK.format(folder=os.path.dirname(lm_eval.__file__), file=os.path.abspath("items.jsonl"))
    overwrite("tasks/local.yaml", task.encode())

    model = small_model("gpt2", vocab_size=Reduced.n_vocab, block_size=512)
    tokenizer = GPT2TokenizerFast.from_pretrained("tokenizer")
    theirs = lm_eval.simple_evaluate(
        Folded(SCRIPTS["gpt2"].to_hf(model), tokenizer=tokenizer, batch_size=8, device="cpu"),
        tasks=["local"], task_manager=TaskManager(include_path="tasks"), log_samples=True, bootstrap_iters=0)
    samples = sorted(theirs["samples"]["local"], key=lambda sample: sample["doc_id"])
    expected = -torch.tensor([[float(choice[0]) for choice in sample["filtered_resps"]] for sample in samples])
    scores = "acc", "acc_norm", "acc_bytes"
    their_answers = np.array([[sample[score] for score in scores] for sample in samples]).T.astype(bool)
    assert (their_answers[1] != their_answers[2]).sum() > 10  # a byte is not always a character

    def scorer(style):
        items = hellaswag.load_items("items.jsonl", style)
        return hellaswag.HellaSwag(items, Reduced(gpt2_bpe), 512, 4096, cpu_world(), style=style)

    ours = scorer("lm-eval")
    assert expected.shape == (600, 4)
    assert (answers(ours, model) == their_answers).all()
    torch.testing.assert_close(ours.losses(model), expected, atol=2e-3, rtol=0)
    other = scorer("completion")  # the other style is another task
    assert ((other.losses(model) - expected).abs() > 0.02).float().mean() > 0.9


# ---- exports, and models of others -----------------------------------------------------------------------------------

def score(monkeypatch, capsys, *options):
    """Run hellaswag.py in this process and return the lines with the three scores."""
    monkeypatch.setattr(sys, "argv", ["hellaswag.py", *options])
    capsys.readouterr()
    hellaswag.main()
    return capsys.readouterr().out.splitlines()[:3]


AWKWARD_TEXTS = [
    "They're sure it isn't HE'S; we'll  see ''s, 's and $'ll.\n\n  indented\t\ttabs   \r\n trailing  ",
    "naïve cafe\u0301 Ā ĀĀ 日本語 👩‍👩‍👧 12345 ½ ²\u00a0\u2003x \x00\x1f\x7f\ufeff",
    "".join(map(chr, [*range(0xd7ff), *range(0x1f300, 0x1f700)])),
    " ", "",
]


@pytest.mark.parametrize("kind", ["bytes", "gpt2"])
def test_an_exported_tokenizer_gives_the_ids_of_training(kind, gpt2_bpe, hellaswag_items):
    """transformers has a class of its own for GPT-2's vocabulary; other programs read tokenizer.json alone."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer
    ours = gpt2_bpe if kind == "gpt2" else byte_tokenizer()
    fineweb.save_tokenizer(".", ours, 100_000)
    theirs = AutoTokenizer.from_pretrained(".")
    alone = Tokenizer.from_file("tokenizer.json")
    for text in [*AWKWARD_TEXTS, *(item["ctx"] for item in hellaswag_items[:300])]:
        ids = ours.encode_ordinary(text)
        assert theirs.encode(text) == alone.encode(text).ids == ids
        assert theirs.decode(ids) == alone.decode(ids) == text
    ids = {"bytes": [97, 256, 98], "gpt2": [64, 50256, 65]}[kind]
    assert theirs.encode("a<|endoftext|>b") == alone.encode("a<|endoftext|>b").ids == ids
    assert theirs.eos_token_id == ours.eot_token == ids[1]
    assert len(theirs) == ours.n_vocab


OLD_NAMES = {  # settings under the names that vLLM, SGLang and llama.cpp's converter ask for
    "gpt2": dict(n_ctx=64),
    "llama": dict(rope_theta=1234.0, head_dim=16),
    "mistral": dict(rope_theta=1234.0, head_dim=16, sliding_window=16),
    "phi": dict(rope_theta=1234.0, partial_rotary_factor=0.75, original_max_position_embeddings=64),
    "gemma": dict(rope_theta=1234.0, rope_local_base_freq=77.0, head_dim=32, sliding_window=16,
                  sliding_window_pattern=2),
    "deepseek": dict(rope_theta=1234.0, qk_rope_head_dim=8, topk_method="noaux_tc", scoring_func="sigmoid",
                     moe_layer_freq=1, rope_interleave=True, num_nextn_predict_layers=0),
}


@each_in_transformers
def test_an_export_has_the_names_of_other_readers(arch):
    model = small_model(arch, vocab_size=256, rope_theta=1234.0, rope_theta_local=77.0)
    SCRIPTS[arch].to_hf(model).save_pretrained("exported")
    with open("exported/config.json") as f:
        config = json.load(f)
    assert {name: config.get(name) for name in OLD_NAMES[arch]} == OLD_NAMES[arch]
    assert config.get("rope_scaling") is None


@each_in_transformers
def test_transformers_4_reads_an_export(arch, gpt2_bpe):
    """The logits are those of the script, and the tokens those of training, with bases of the rotation that are not the
    defaults. DeepSeek's multi-token prediction, which no release before transformers 5 has, is not part of the
    export."""
    folder = os.environ.get("OLD_TRANSFORMERS")
    if not folder:
        pytest.skip("OLD_TRANSFORMERS=FOLDER, after pip install --target FOLDER --no-deps transformers==4.57.1 "
                    "huggingface_hub==0.36.0 tokenizers==0.22.1")
    # five layers, so that Gemma has both kinds in its pattern and DeepSeek experts
    model = small_model(arch, n_layer=5, vocab_size=50304, rope_theta=1234.0, rope_theta_local=77.0, norm_eps=1e-3)
    SCRIPTS[arch].to_hf(model).save_pretrained("exported")
    fineweb.save_tokenizer("exported", gpt2_bpe, 64)
    idx = tokens(2, 64, vocab=50304)
    torch.save(idx, "idx.pt")
    code = ("import torch, transformers\n"
            "model = transformers.AutoModelForCausalLM.from_pretrained('exported').eval()\n"
            "with torch.no_grad(): logits = model(torch.load('idx.pt')).logits\n"
            "torch.save(logits, 'logits.pt')\n"
            "tokenizer = transformers.AutoTokenizer.from_pretrained('exported')\n"
            "print(transformers.__version__, tokenizer.encode(\"I'm  here\"))")
    result = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": folder},
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"4.57.1 {gpt2_bpe.encode_ordinary('I' + chr(39) + 'm  here')}\n"
    logits, _ = model(idx)
    torch.testing.assert_close(torch.load("logits.pt"), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_an_export_is_complete(arch, monkeypatch, capsys, hellaswag_items):
    """Without a network it continues text and is scored; its card says what the log says."""
    from transformers import pipeline
    write_jsonl("h.jsonl", hellaswag_items[:12])
    train(arch, monkeypatch, *QUICK, "--hella_limit=12", "--hellaswag_file=h.jsonl", "--block_size=64")
    folder = f"log/{arch}-tiny"
    train(arch, monkeypatch, *QUICK, "--export=exported")
    with open("exported/README.md") as f:
        card = f.read()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"{trained_model(arch).num_params()['total']:,} parameters" in card
    assert "8 steps, 4,096 tokens of the folder tiny_data\n" in card
    assert f"validation loss {stream_of('val', folder)[-1]:.4f}\n" in card
    p = stream_of("hella", folder)[-1]
    p = round(12 * p) / 12  # the log has four digits of it
    assert f"{p:.4f} +- {(p * (1 - p) / 12) ** 0.5:.4f}, 12 items\n" in card
    text = pipeline("text-generation", "exported")("Hello", max_new_tokens=5)[0]["generated_text"]
    assert text.startswith("Hello")
    options = "--hellaswag_file=h.jsonl", "--device=cpu"
    expected = score(monkeypatch, capsys, f"{folder}/model_00008.pt", *options)
    assert score(monkeypatch, capsys, "exported", *options) == expected
    # an older run kept which items were right
    os.remove(f"{folder}/hella_8.npz")
    np.save(f"{folder}/hella_8.npy", np.arange(12) < 3)
    train(arch, monkeypatch, *QUICK, "--export=older")
    with open("older/README.md") as f:
        assert "- HellaSwag, acc_norm: 0.2500 +- 0.1250, 12 items\n" in f.read()
    # of a step that was not evaluated, and without a log, nothing is claimed
    for name in "model_00002.pt", "model_00008.pt":
        os.makedirs("alone", exist_ok=True)
        shutil.copy(f"{folder}/{name}", "alone")
    for number, path in enumerate([f"{folder}/model_00002.pt", "alone/model_00008.pt"]):
        train(arch, monkeypatch, *QUICK, f"--resume={path}", f"--export=e{number}")
        with open(f"e{number}/README.md") as f:
            card = f.read()
        assert "tokens of the folder tiny_data" in card
        assert "validation" not in card
        assert "HellaSwag" not in card


def test_an_export_that_fails_is_one_line(monkeypatch, capsys):
    train("gpt2", monkeypatch, *QUICK)

    def export(path="exported"):
        train("gpt2", monkeypatch, *QUICK, f"--export={path}")

    overwrite("file", b"mine")
    bad(capsys, lambda: export("file"), "file", "not a folder")
    bad(capsys, lambda: export("file/exported"), "cannot write file/exported")
    bad(capsys, lambda: export("/proc/exported"), "cannot write /proc/exported")
    with open("file") as f:
        assert f.read() == "mine"
    errors = [ImportError("cannot import name 'GPT2LMHeadModel'"), TypeError("unexpected keyword argument 'n_ctx'"),
              AttributeError("no such class"), KeyError("gpt2"), RuntimeError("Missing key(s)\nin state_dict")]
    for error in errors:
        def to_hf(model, error=error):
            raise error
        monkeypatch.setattr(SCRIPTS["gpt2"], "to_hf", to_hf)
        bad(capsys, export, "pip install -U transformers", str(error).split("\n")[0])
        assert not os.path.exists("exported")


def own_tokenizer(folder, kind):
    """Write a tokenizer of few tokens: as GPT-NeoX's, as OPT's with </s> in front, or as LLaMA's sentencepiece with
    <s> and a space in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    start = {"neox": "<|endoftext|>", "opt": "</s>", "llama": "<s>"}[kind]
    tokenizer = Tokenizer(models.BPE(unk_token=start))
    if kind == "llama":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[start], show_progress=False)
    tokenizer.train_from_iterator([" ".join(AWKWARD_TEXTS[:1] + [item["ctx"] for item in OTHERS])], trainer)
    if kind != "neox":
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=start, eos_token=start).save_pretrained(folder)


OTHERS = [{"ctx": f"A person, number {i}, isn't in a boat and", "activity_label": "Boating", "ctx_a": f"Number {i}.",
           "ctx_b": "he rows", "endings": ["rows it.", "'s eating clouds...", "sings to it, quietly.", "is"],
           "label": i % 4} for i in range(12)]
SMALL_OTHER = dict(vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                   max_position_embeddings=128, initializer_range=0.5)
OTHER_MODELS = [  # class without its ending, tokenizer, settings
    ("GPTNeoX", "neox", {}),
    ("OPT", "opt", dict(ffn_dim=64, word_embed_proj_dim=16, init_std=0.5)),
    ("Llama", "llama", {}),
    ("Gemma2", "llama", dict(head_dim=16, num_key_value_heads=1, final_logit_softcapping=2.0)),
    ("Cohere", "neox", dict(logit_scale=0.3)),
    ("Granite", "neox", dict(logits_scaling=3.0)),
    ("Bloom", "neox", dict(n_layer=2, n_head=2, max_position_embeddings=None)),  # it has no positions that run out
]


def other_model(name, **settings):
    """Write a model of transformers with random weights to the folder "other"."""
    import transformers
    torch.manual_seed(0)
    settings = {key: value for key, value in {**SMALL_OTHER, **settings}.items() if value is not None}
    config = getattr(transformers, f"{name}Config")(**settings)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained("other")


@pytest.mark.parametrize("style", ["completion", "lm-eval"])
@pytest.mark.parametrize("name, kind, settings", OTHER_MODELS, ids=[name for name, _, _ in OTHER_MODELS])
def test_other_models_are_scored_as_the_harness_does(name, kind, settings, style):
    """A model comes with its own tokenizer, and all that it does to its logits counts."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    other_model(name, **settings)
    own_tokenizer("other", kind)
    model, tokenizer, block_size = hellaswag.load_hf_model("other")
    assert block_size == (2048 if name == "Bloom" else 128)
    scorer = hellaswag.HellaSwag(OTHERS, tokenizer, block_size, 512, cpu_world(), style=style)
    requests = []
    for item in OTHERS:
        context = item["ctx"] if style == "completion" else f"Boating: {item['ctx_a']} He rows"
        requests += [Instance("loglikelihood", {}, (context, " " + ending), 0) for ending in item["endings"]]
    theirs = HFLM("other", batch_size=8, device="cpu").loglikelihood(requests, disable_tqdm=True)
    expected = -torch.tensor([likelihood for likelihood, _ in theirs]).view(-1, 4)
    assert expected.std() > 1
    torch.testing.assert_close(scorer.losses(model.eval()), expected, atol=2e-3, rtol=0)
    if style == "completion":
        assert len(np.unique(scorer.lengths)) > 2


REFUSED_MODELS = [  # class without its ending, settings, words
    ("GPTNeoX", dict(vocab_size=50304), "tokenizer.json"),
    ("OPT", dict(vocab_size=50272, ffn_dim=64, word_embed_proj_dim=32), "tokenizer.json"),
    ("Llama", dict(vocab_size=50257, bos_token_id=50256, eos_token_id=50256), "tokenizer.json"),
    ("Llama", dict(vocab_size=256), "tokenizer.json"),
    ("GPT2", dict(vocab_size=256, bos_token_id=0, eos_token_id=0), "tokenizer.json"),
    ("GPT2", dict(vocab_size=50304), "tokenizer.json"),
    ("GPT2", dict(vocab_size=50257, bos_token_id=0, eos_token_id=2), "tokenizer.json"),
]


@pytest.mark.parametrize("name, settings, word", REFUSED_MODELS)
def test_a_number_of_tokens_names_no_tokenizer(name, settings, word, monkeypatch, capsys):
    import transformers
    monkeypatch.setattr(transformers, "GPT2ForCausalLM", transformers.GPT2LMHeadModel, raising=False)
    write_jsonl("h.jsonl", OTHERS)
    other_model(name, **settings)
    options = "other", "--hellaswag_file=h.jsonl", "--device=cpu"
    bad(capsys, lambda: score(monkeypatch, capsys, *options), "other has no tokenizer", word)


def test_gpt2_needs_no_tokenizer_of_its_own(monkeypatch, capsys, gpt2_bpe):
    import transformers
    monkeypatch.setattr(transformers, "GPT2ForCausalLM", transformers.GPT2LMHeadModel, raising=False)
    write_jsonl("h.jsonl", OTHERS)
    other_model("GPT2", vocab_size=50257)
    options = "other", "--hellaswag_file=h.jsonl", "--device=cpu"
    expected = score(monkeypatch, capsys, *options)
    assert "/12)" in expected[0]
    fineweb.save_tokenizer("other", gpt2_bpe, 128)
    assert score(monkeypatch, capsys, *options) == expected
    overwrite("other/tokenizer.json", b"of another vocabulary, and damaged")
    bad(capsys, lambda: score(monkeypatch, capsys, *options), "other has no tokenizer that can be read")


def test_a_model_without_all_its_weights_is_refused(monkeypatch, capsys):
    from safetensors.torch import load_file, save_file
    write_jsonl("h.jsonl", OTHERS)
    other_model("Llama")
    own_tokenizer("other", "llama")
    options = "other", "--hellaswag_file=h.jsonl", "--device=cpu"
    assert score(monkeypatch, capsys, *options)
    weights = load_file("other/model.safetensors")
    head = weights.pop("lm_head.weight")
    save_file(weights, "other/model.safetensors", {"format": "pt"})
    bad(capsys, lambda: score(monkeypatch, capsys, *options), "other", "lm_head.weight")
    save_file({**weights, "lm_head.weight": head[:100]}, "other/model.safetensors", {"format": "pt"})
    bad(capsys, lambda: score(monkeypatch, capsys, *options), "other", "lm_head.weight")
    overwrite("other/model.safetensors", b"damaged")
    bad(capsys, lambda: score(monkeypatch, capsys, *options), "other")
    # the tokenizer of another model
    other_model("Llama", vocab_size=100)
    bad(capsys, lambda: score(monkeypatch, capsys, *options), "other", "the model only 100 tokens")


@pytest.mark.parametrize("vocab_size", [255, 256, 8192, 50256])
def test_an_unknown_vocabulary(vocab_size, monkeypatch, capsys):
    """Without vocab.tiktoken fewer tokens than GPT-2's train without text, which is said once; what needs text is
    refused in a line."""
    shards("data", vocab=250)
    write_jsonl("h.jsonl", OTHERS)
    options = [*QUICK, "--data_dir=data", f"--vocab_size={vocab_size}", "--hella_limit=4", "--hellaswag_file=h.jsonl",
               "--sample_interval=4"]
    train("gpt2", monkeypatch, *options)
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert "no samples, no HellaSwag and no bits per byte" in err
    assert f"vocab_size={vocab_size}" in err
    assert "sample:" not in out
    assert len(stream_of("val", "log/gpt2-tiny")) == 3
    assert len(stream_of("hella", "log/gpt2-tiny")) == 0
    for call in (lambda: train("gpt2", monkeypatch, *options, "--sample=Hello"),
                 lambda: score(monkeypatch, capsys, "log/gpt2-tiny/model_00008.pt", "--hellaswag_file=h.jsonl")):
        with pytest.raises(SystemExit) as e:
            call()
        assert e.value.code == 1
        assert capsys.readouterr().err.count("\n") == 1
    train("gpt2", monkeypatch, *options, "--export=exported")
    assert not os.path.exists("exported/tokenizer.json")
    with open("exported/config.json") as f:
        assert json.load(f).get("eos_token_id") is None


# ---- the modes, and samples -----------------------------------------------------------------------------------------

def test_bench_keeps_nothing(monkeypatch, capsys):
    monkeypatch.setitem(common.PEAK_FLOPS, "cpu", 1e12)
    train("gpt2", monkeypatch, *QUICK, "--bench=3")
    out = capsys.readouterr().out
    assert re.search(r"median of 3 steps: [\d.]+ ms \| [\d,]+ tok/s \| [\d.]+% MFU", out)
    assert os.listdir() == []


def test_samples_and_short_contexts(monkeypatch, capsys):
    """A sample within a run shortens its prompt; a recurrent model has no limit, others say theirs."""
    for arch in "gpt2", "rwkv":
        train(arch, monkeypatch, *quick(arch), "--block_size=8", "--sample_interval=4")
        assert capsys.readouterr().out.count("sample: Hello, I") == 2
    prompt = "--sample=" + 40 * "x"
    train("rwkv", monkeypatch, *quick("rwkv"), "--block_size=8", prompt)
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK, "--block_size=8", prompt), "40 tokens")


def test_samples_have_a_length_and_a_temperature(monkeypatch, capsys):
    train("gpt2", monkeypatch, *QUICK)
    capsys.readouterr()

    def sample(*options):
        train("gpt2", monkeypatch, *QUICK, "--sample=The ", *options)
        return capsys.readouterr().out[:-1]

    greedy = {sample("--temperature=0", "--max_new_tokens=40", f"--seed={seed}") for seed in (1, 2)}
    assert len(greedy) == 1
    # the reference: the likeliest byte after what is there
    model, text = trained_model("gpt2"), list(b"The ")
    for _ in range(40):
        text.append(model(torch.tensor([text[-32:]]))[0][0, -1].argmax().item())
    assert bytes(text).decode(errors="replace") in greedy
    assert len({sample(f"--seed={seed}") for seed in (1, 2)}) == 2
    assert len(sample("--max_new_tokens=3").encode()) <= 4 + 3 * 3  # a byte that is no text shows as three


def test_samples_never_contain_padding():
    model = small_model("gpt2", vocab_size=512, block_size=16)
    with torch.no_grad():
        model.lm_head.weight[256:] *= 100  # the padding would win every draw
    text = common.generate(model, byte_tokenizer(), list(b"ab"), "cpu", seed=0, new_tokens=40)
    assert text.startswith("ab")
    assert len(text.encode(errors="replace")) >= 40
    with pytest.raises(SystemExit, match="17 tokens"):
        common.generate(model, byte_tokenizer(), 17 * [97], "cpu", seed=0)
    assert common.generate(model, byte_tokenizer(), [], "cpu", seed=0)
    nearly_zero, zero = (common.generate(model, byte_tokenizer(), [97], "cpu", seed=0, temperature=temperature)
                         for temperature in (1e-40, 0.0))
    assert nearly_zero == zero


# ---- bad input: one line, exit code 1, nothing lost ------------------------------------------------------------------

@pytest.mark.parametrize("option, words", [
    ("--n_layers=3", "--n_layer"),
    ("--learn_rate=1", "--learning_rate"),
    ("--zzz", "--help"),
    ("stray", "stray"),
    ("--n_layer=two", "--n_layer"),
    ("--n_layer=0", "n_layer=0"),
    ("--batch_size=-4", "batch_size=-4"),
    ("--learning_rate=nan", "learning_rate"),
    ("--learning_rate=1e300", "learning_rate"),
    ("--compile=maybe", "--compile"),
    ("--optimizer=sgd", "muon"),
    ("--dtype=fp8", "bfloat16"),
    ("--temperature=-1", "temperature"),
    ("--max_new_tokens=0", "max_new_tokens"),
    ("--val_full_tokens=5", "val_full_tokens=5"),
    ("--device=tpu9", "--device=tpu9"),
    ("--n_head=5", "n_head=5"),
    ("--bench=-1", "bench"),
    ("--bench=1 --sample=x", "one at a time"),
    ("--beta1=1", "beta1"),
    ("--seed=18446744073709551616", "seed"),
    ("--n_embd=9223372036854775800", "n_embd"),
    ("--sample=x", "no checkpoint"),
    ("--export=x", "no checkpoint"),
    ("--resume=x.pt", "x.pt"),
    ("--data_dir=nowhere", "nowhere"),
])
def test_bad_options(option, words, monkeypatch, capsys):
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK, *option.split()), words)
    assert not os.path.exists("log")


def test_no_clipping(monkeypatch):
    """--grad_clip=0 means no clipping, as in nanoGPT; the norm is logged."""
    train("gpt2", monkeypatch, *QUICK, "--grad_clip=0", "--log_dir=log/none")
    train("gpt2", monkeypatch, *QUICK, "--grad_clip=1e9", "--log_dir=log/high")
    train("gpt2", monkeypatch, *QUICK)
    assert log_of("log/none") == log_of("log/high") != log_of()
    assert stream_of("norm", "log/none").max() > 1


@pytest.mark.parametrize("environment", [
    {"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "two"}, {"RANK": "1"}, {"LOCAL_RANK": "x"},
    {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}])
def test_an_environment_without_torchrun(environment, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK), "WORLD_SIZE", "torchrun")
    assert not os.path.exists("log")


@each_trained
def test_too_little_memory_is_said_first(arch, monkeypatch, capsys):
    """The largest batch that fits and divides is named; what fits is not refused."""
    def attempt(*options):
        train(arch, monkeypatch, *quick(arch), "--vocab_size=50304", "--batch_size=16", "--max_steps=1", *options)

    shards("data", vocab=50257)
    monkeypatch.setattr(run, "free_memory", lambda device: 2**32)
    attempt("--data_dir=data", "--log_dir=log/fits")
    monkeypatch.setattr(run, "free_memory", lambda device: 3 * 2**27)
    bad(capsys, lambda: attempt("--data_dir=data"), "--batch_size=16 needs about", "GiB are free", "use --batch_size=")
    monkeypatch.setattr(run, "free_memory", lambda device: 2**20)
    bad(capsys, lambda: attempt("--data_dir=data"), "a smaller model")
    assert not os.path.exists(f"log/{arch}-tiny")


MEMORY = r"""
import os, re, resource, sys
import torch, common, run, train_{arch} as script
cfg = script.Config(**{options})
world = common.World(torch.device("cpu"))
run.check_memory(cfg, world, script.Model, 1)
before = int(re.search(r"VmRSS:\s*(\d+)", open("/proc/self/status").read())[1])
model = script.Model(cfg)
optimizer = model.configure_optimizers(cfg, "cpu")
idx = torch.zeros(cfg.batch_size, cfg.block_size, dtype=torch.long)
for _ in range(2):
    _, loss = model(idx, idx)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print((int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]) - before) / 2**20)
"""


@pytest.mark.parametrize("arch, widths", [
    ("gpt2", {"n_head": 4}), ("deepseek", {"n_head": 4}), ("rwkv", {}),
    ("gemma", {"n_head": 4, "n_kv_head": 1, "ffn_dim": 816}),
    ("gpt2", {"n_head": 8, "n_embd": 1024, "block_size": 16})])  # nearly all of it is parameters
def test_the_estimate_of_memory_is_good_to_30_percent(arch, widths):
    options = dict(n_layer=4, n_embd=256, block_size=256, batch_size=8) | widths
    code = MEMORY.format(arch=arch, options=options)
    result = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    estimate, measured = result.stdout.splitlines()
    estimate = float(re.search(r"needs about (\S+) GiB", estimate)[1])
    assert estimate == pytest.approx(float(measured), rel=0.3)


@each_arch
def test_the_estimate_of_memory_leaves_nothing_behind(arch):
    def tensors():
        gc.collect()
        return sum(type(x) is torch.Tensor for x in gc.get_objects())

    cfg = SCRIPTS[arch].Config(**SCRIPTS[arch].TINY | {"vocab_size": 320, "block_size": 32})
    before = tensors()
    for _ in range(2):
        run.estimate_memory(cfg, common.World(torch.device("cpu")), SCRIPTS[arch].Model, compiled=False)
    assert tensors() <= before + 10  # a table of rotary positions may stay


@each_arch
def test_widths_follow_n_embd(arch, monkeypatch):
    """A narrower model keeps the proportions of the default one, unless its widths are given."""
    def config(*options):
        monkeypatch.setattr(sys, "argv", ["train", *options])
        return common.parse_args(SCRIPTS[arch].Config, SCRIPTS[arch].TINY)[0]

    default = config()
    assert default == SCRIPTS[arch].Config()
    half = config(f"--n_embd={default.n_embd // 2}")
    for name in "n_head", "ffn_dim", "moe_ffn_dim", "q_lora_rank", "kv_lora_rank":
        if hasattr(default, name):
            assert getattr(half, name) == getattr(default, name) / 2
    share = [SCRIPTS[arch].Model(cfg).num_params()["non_embedding"] / cfg.n_embd**2 for cfg in (half, default)]
    assert share[0] == pytest.approx(share[1], rel=0.06)
    for n_embd in 128, 192, 256, 320, 384, 512:
        SCRIPTS[arch].Model(config("--n_layer=2", "--vocab_size=512", f"--n_embd={n_embd}"))
    SCRIPTS[arch].Model(config("--tiny", "--n_embd=64"))
    if hasattr(default, "n_kv_head"):
        assert config("--n_head=8").n_kv_head == 2
        assert config("--n_embd=128", "--ffn_dim=400").ffn_dim == 400


def test_the_built_in_text_has_its_own_vocabulary(monkeypatch):
    """A model of the folder that --tiny wrote gets 257 tokens and padding, with --tiny and without."""
    fineweb.write_builtin_text("tiny_data")
    for options in ["--tiny"], ["--data_dir=tiny_data"]:
        monkeypatch.setattr(sys, "argv", ["train", *options])
        assert common.parse_args(SCRIPTS["gpt2"].Config, SCRIPTS["gpt2"].TINY)[0].vocab_size == 320


def test_an_error_is_one_line_without_a_traceback():
    result = shell("train_gpt2.py", "--data_dir=nowhere")
    assert is_one_line_error(result)
    assert result.stdout == ""
    assert "nowhere" in result.stderr


class Attack:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def test_checkpoints_that_must_not_be_used(monkeypatch, capsys):
    train("gpt2", monkeypatch, *QUICK)
    log = log_of()
    path = "log/gpt2-tiny/model_00008.pt"

    def same_folder(*options):
        train("gpt2", monkeypatch, *QUICK, *options)

    def new_folder(*options):
        train("gpt2", monkeypatch, *QUICK, "--log_dir=log/new", *options)

    bad(capsys, lambda: same_folder(), "--resume=auto", "--log_dir")
    bad(capsys, lambda: same_folder("--resume=log/gpt2-tiny/model_00002.pt"), "move them away")
    bad(capsys, lambda: same_folder("--resume=auto", "--max_steps=7"), "max_steps=7")
    torch.save({"arch": Attack()}, "attack.pt")
    bad(capsys, lambda: new_folder("--resume=attack.pt"), "attack.pt")
    assert not os.path.exists("executed")
    with open(path, "rb") as f:
        overwrite("cut.pt", f.read(5000))
    overwrite("empty.pt", b"")
    torch.save({"model": {}}, "part.pt")
    torch.save([1, 2], "list.pt")
    for name in "cut.pt", "empty.pt", "part.pt", "list.pt", "log":
        bad(capsys, lambda: new_folder(f"--resume={name}"), name)
    torch.save({**checkpoint_of(), "arch": "llama"}, "llama.pt")
    bad(capsys, lambda: new_folder("--resume=llama.pt"), "llama", "train_llama.py")
    bad(capsys, lambda: new_folder(f"--resume={path}", "--n_layer=3", "--n_embd=16"), "--n_layer=1", "--n_embd=32")
    bad(capsys, lambda: new_folder(f"--resume={path}", "--optimizer=muon"), "optimizer")
    bad(capsys, lambda: same_folder("--sample=" + "x" * 33), "33 tokens")
    assert log_of() == log
    assert not os.path.exists("log/new")
    # auto takes the newest readable one
    overwrite("log/gpt2-tiny/model_00009.pt", b"half")
    same_folder("--resume=auto")
    assert "model_00009.pt" in capsys.readouterr().err
    assert log_of() == log
    for step in 2, 4, 6, 8:
        overwrite(f"log/gpt2-tiny/model_{step:05d}.pt", b"half")
    bad(capsys, lambda: same_folder("--resume=auto"), "model_00009.pt")
    assert log_of() == log


def test_a_log_is_never_cut_by_mistake(monkeypatch, capsys):
    def attempt(*options):
        train("gpt2", monkeypatch, *QUICK, *options)

    attempt()
    attempt("--seed=2", "--log_dir=log/b")
    log = log_of()
    shutil.copy("log/gpt2-tiny/model_00008.pt", "elsewhere.pt")
    bad(capsys, lambda: attempt("--resume=elsewhere.pt"), "another run")
    for path in checkpoints():
        os.remove(path)
    bad(capsys, lambda: attempt("--resume=auto"), "no checkpoint")
    bad(capsys, lambda: attempt(), "--resume=auto")
    assert log_of() == log
    # stopped before the first step, or before the first checkpoint, there is nothing to lose
    os.makedirs("log/c")
    overwrite("log/c/log.txt", b"0 val 5.5159\n")
    attempt("--log_dir=log/c")
    os.makedirs("log/d")
    overwrite("log/d/log.txt", b"0 val 5.5159\n0 train 5.5\n1 tra")
    attempt("--log_dir=log/d", "--resume=auto")
    assert log_of("log/c") == log_of("log/d") == log


def test_a_full_disk_leaves_the_old_checkpoint(monkeypatch, capsys):
    save = torch.save

    def full(state, f):
        save(state, f)
        if state["step"] == 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK), "model_00004.pt", "No space left")
    monkeypatch.setattr(torch, "save", save)
    assert glob.glob("log/gpt2-tiny/model*") == ["log/gpt2-tiny/model_00002.pt"]
    train("gpt2", monkeypatch, *QUICK, "--resume=auto")


@pytest.mark.parametrize("arch", ["gpt2", "rwkv"])
def test_a_full_disk_leaves_no_half_export(arch, monkeypatch, capsys):
    def export():
        train(arch, monkeypatch, *quick(arch), "--export=exported")

    train(arch, monkeypatch, *quick(arch))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # no file may grow beyond this
    try:
        bad(capsys, export, "cannot write exported")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not os.path.exists("exported")
    export()


def test_a_folder_that_disappears_is_made_again(monkeypatch):
    save = run.Run.save

    def after_a_mishap(self, step):
        if step == 2:
            shutil.rmtree("log/gpt2-tiny")
        save(self, step)

    monkeypatch.setattr(run.Run, "save", after_a_mishap)
    train("gpt2", monkeypatch, *QUICK)
    assert len(checkpoints()) == 4


def test_the_newest_checkpoints_stay(monkeypatch):
    def files(*steps):
        return [f"log/gpt2-tiny/model_{step:05d}.pt" for step in steps]

    options = [*QUICK, "--checkpoint_interval=1", "--keep_checkpoints=2"]
    train("gpt2", monkeypatch, *options)
    assert checkpoints() == files(7, 8)
    # resumed at its end, the run is evaluated and saved again
    train("gpt2", monkeypatch, *options, "--keep_checkpoints=1", "--resume=auto")
    assert checkpoints() == files(8)
    assert run_of("log/gpt2-tiny")["tokens_per_second"] > 0
    train("gpt2", monkeypatch, *options, "--keep_checkpoints=0", "--log_dir=all")
    assert len(checkpoints("all")) == 8


def test_rotation_takes_nothing_else(monkeypatch, capsys):
    """A damaged newer checkpoint, which --resume passes over, does not count; files of other names stay."""
    options = [*QUICK, "--checkpoint_interval=1", "--keep_checkpoints=1", "--log_dir=run"]
    train("gpt2", monkeypatch, *options)
    others = ["run/model_best_model_00001.pt", "run/model_3.pt", "run/model_00100.pt"]
    for path in others:
        overwrite(path, b"")
    os.mkdir("run/model_00002.pt")
    os.rename("run/model_00008.pt", "run/model_00005.pt")
    train("gpt2", monkeypatch, *options, "--resume=auto")
    assert checkpoints("run") == sorted([*others, "run/model_00002.pt", "run/model_00008.pt"])
    assert "run/model_00100.pt is not a readable checkpoint" in capsys.readouterr().err
    os.remove("run/log.txt")
    bad(capsys, lambda: train("gpt2", monkeypatch, *options), "holds a run")


def test_a_bad_update_stops_the_run_and_is_never_saved(monkeypatch, capsys):
    options = [*QUICK, "--learning_rate=1e30", "--warmup_steps=0", "--grad_clip=1e30", "--checkpoint_interval=1"]
    bad(capsys, lambda: train("gpt2", monkeypatch, *options), "step", "learning_rate")
    for path in checkpoints():
        assert all(p.isfinite().all() for p in run.read_checkpoint(path)["model"].values())


def test_a_bad_update_names_the_checkpoint_that_was_loaded(monkeypatch, capsys):
    """Not a newer one that cannot be read, and not one of the folder when the run came from elsewhere."""
    train("gpt2", monkeypatch, *QUICK)
    overwrite("log/gpt2-tiny/model_00008.pt", b"half")
    options = [*QUICK, "--learning_rate=1e30", "--warmup_steps=0", "--grad_clip=1e30"]
    bad(capsys, lambda: train("gpt2", monkeypatch, *options, "--resume=auto"), "model_00006.pt")
    elsewhere = ["--resume=log/gpt2-tiny/model_00004.pt", "--log_dir=log/b"]
    bad(capsys, lambda: train("gpt2", monkeypatch, *options, *elsewhere), "log/gpt2-tiny/model_00004.pt")
    bad(capsys, lambda: train("gpt2", monkeypatch, *options, "--bench=3"), "step 0")


def test_out_of_memory_while_resuming_is_not_a_misfit(monkeypatch, capsys):
    def load_state_dict(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 13 GiB")

    train("gpt2", monkeypatch, *QUICK)
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", load_state_dict)
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK, "--resume=auto"), "error: out of memory")


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 13 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
])
def test_out_of_memory_says_what_to_do(error, monkeypatch, capsys):
    def forward(*args):
        raise error

    monkeypatch.setattr(SCRIPTS["gpt2"].Model, "forward", forward)
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK), "--batch_size", "the result is the same")


def test_ctrl_c_before_the_loop_is_one_line(monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(SCRIPTS["gpt2"].Model, "configure_optimizers", interrupt)
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK), "interrupted")
