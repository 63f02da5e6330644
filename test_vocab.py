"""
Vocabularies of one's own, and bits per byte, checked on a CPU: how fineweb.py trains a vocabulary, what the shards, the
training scripts, checkpoints and exports make of it, and what is refused.

    pytest -q test_vocab.py                                # this file alone; test_models.py says what to install

The references are the definition of BPE (each new token is a most frequent pair), a naive encoder, the tokenizer of
transformers, and lm-evaluation-harness's bits_per_byte.
"""
import base64
import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

import common
import fineweb
from conftest import BYTE_VOCAB, QUICK, SCRIPTS, bad, byte_tokenizer, shell, stream_of, tokens, train

# the first document is as long as all that is held out; the others have what could trip a tokenizer
HELD_OUT = "\n".join(text for name, text in sorted(topics.items()) if name < "c")
DOCUMENTS = [HELD_OUT, "", "naïve 日本語 😀 \u0000\t 123456 don't <|endoftext|>  \n\n x", "lone \ud800 surrogate",
             *(text for name, text in sorted(topics.items()) if name > "c")]
TEXTS = [text.replace("\ud800", "\ufffd") for text in DOCUMENTS if text]  # as tiktoken reads them
SIZE = 500  # tokens of the vocabulary


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Return the path of a folder with docs.jsonl and the shards that fineweb.py makes of it in own/."""
    folder = tmp_path_factory.mktemp("own")
    with open(folder / "docs.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)
    make_shards(folder, "own", f"--vocab_size={SIZE}")
    return folder


def make_shards(folder, name, *options):
    """Run fineweb.py on docs.jsonl in the folder; return its stdout."""
    n_val = 20000
    result = shell("fineweb.py", f"--files={folder}/docs.jsonl", f"--val_tokens={n_val}", "--shard_size=100000",
                   "--num_proc=1", f"--data_dir={folder}/{name}", *options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def contents(folder, ending=""):
    """Return the contents of the files of a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name.endswith(ending)}


def read_shards(folder):
    """Return all tokens in the shards of a folder, validation first."""
    paths = sorted(folder.glob("*.bin"), key=lambda path: ("train" in path.name, path.name))
    return np.concatenate([fineweb.open_shard(str(path)) for path in paths])


def words_of(text):
    """Return the words of a text, within which tokens are merged, in bytes: GPT-2's pattern as tiktoken runs it."""
    import regex
    from tiktoken_ext.openai_public import r50k_pat_str
    return [word.encode() for word in regex.findall(r50k_pat_str, text)]


def merged(parts, token):
    """Return the parts of a word after each pair that makes the token, from left to right, has been joined."""
    joined = []
    for part in parts:
        if joined and joined[-1] is not None and joined[-1] + part == token:
            joined[-1] = token
            joined.append(None)  # the token just made takes no part in another pair
        else:
            joined = [each for each in joined if each is not None] + [part]
    return [each for each in joined if each is not None]


# ---- training a vocabulary -------------------------------------------------------------------------------------------

def test_each_token_is_a_most_frequent_pair():
    texts = HELD_OUT[:20000], "naïve 日本語 " * 200
    lines = fineweb.train_vocab(texts, 400).splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(399))
    vocab = [base64.b64decode(line.split()[0]) for line in lines]
    assert vocab[:256] == [bytes([i]) for i in range(256)]
    words = Counter(words_of(texts[0]) + words_of(texts[1]))
    split = {word: [word[i:i + 1] for i in range(len(word))] for word in words}
    for token in vocab[256:]:
        pairs = Counter()
        for word, parts in split.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += words[word]
        best = max(pairs.values())
        assert max(count for (a, b), count in pairs.items() if a + b == token) == best, token
        split = {word: merged(parts, token) if token in word else parts for word, parts in split.items()}


def test_shards_hold_the_text(own):
    """The ids are those of a naive encoder, which joins the pair of lowest id until none is left."""
    ranks = fineweb.ranks_of((own / "own/vocab.tiktoken").read_text())
    token_of = {i: token for token, i in ranks.items()} | {SIZE - 1: b"<|endoftext|>"}
    ids = read_shards(own / "own").tolist()
    assert b"".join(token_of[i] for i in ids) == "".join("<|endoftext|>" + text for text in TEXTS).encode()

    def encode(word):
        parts = [word[i:i + 1] for i in range(len(word))]
        while candidates := [ranks[a + b] for a, b in zip(parts, parts[1:]) if a + b in ranks]:
            parts = merged(parts, token_of[min(candidates)])
        return [ranks[part] for part in parts]

    known = {}
    expected = []
    for text in TEXTS:
        expected.append(SIZE - 1)
        for word in words_of(text):
            known[word] = known.get(word) or encode(word)
            expected += known[word]
    assert ids == expected


def test_the_vocabulary_is_the_same_however_it_came_to_be(own):
    """From a file, with two workers, after a kill between vocabulary and shards: the same bytes."""
    expected = contents(own / "own", (".bin", ".tiktoken"))
    make_shards(own, "given", f"--vocab={own}/own/vocab.tiktoken", "--num_proc=2")
    assert contents(own / "given", (".bin", ".tiktoken")) == expected
    killed = own / "killed"
    killed.mkdir()
    progress = json.loads((own / "own/progress.json").read_text())
    fresh = {"vocab": "", "shard": 0, "document": 0, "token": 0, "tokens": 0, "counts": [], "finished": False}
    (killed / "progress.json").write_text(json.dumps(progress | fresh))
    (killed / "vocab.tiktoken").write_bytes(expected["vocab.tiktoken"][:1000])
    make_shards(own, "killed", f"--vocab_size={SIZE}")
    assert contents(killed, (".bin", ".tiktoken")) == expected
    assert json.loads((killed / "progress.json").read_text()) == progress
    table = shell("fineweb.py", "--check", f"--data_dir={killed}")
    assert table.returncode == 0, table.stdout
    assert "0 bad" in table.stdout
    assert f"{len(TEXTS):,}" in re.sub(r"\s+", " ", table.stdout) or "a document" in table.stdout


def with_line(number, line):
    """Return the vocabulary of bytes with another line; None leaves it out."""
    lines = BYTE_VOCAB.splitlines(keepends=True)
    lines[number:number + 1] = [] if line is None else [line]
    return "".join(lines)


LONG = BYTE_VOCAB + "".join(f"{base64.b64encode(b'a%d' % i).decode()} {i}\n" for i in range(256, 2**16))


@pytest.mark.parametrize("text, says", [
    ("", "256 of the 256 bytes"),
    (with_line(255, None), "1 of the 256 bytes"),
    (with_line(100, None), "line 101 must have the id 100"),
    (with_line(7, "YQ== 7\n"), "new token"),
    (with_line(3, "%% 3\n"), "line 4"),
    (with_line(3, "AAA\n"), "line 4"),
    (BYTE_VOCAB + "\n", "line 257"),
    ("\xff", "vocab.tiktoken"),
    (LONG, "65536 tokens"),
])
def test_a_bad_vocabulary_is_one_line(text, says, tmp_path, capsys):
    (tmp_path / "vocab.tiktoken").write_bytes(text.encode("latin-1"))
    bad(capsys, lambda: fineweb.vocab_of("."), "vocab.tiktoken is no vocabulary", says)
    bad(capsys, lambda: train("gpt2", pytest.MonkeyPatch(), *QUICK, "--data_dir=."), "vocab.tiktoken", says)


@pytest.mark.parametrize("options, says", [
    ("--vocab_size=256", "--vocab_size 256 must be from 257"),
    ("--vocab_size=65537", "to 65536"),
    ("--vocab_size=500 --vocab=x", "use one of them"),
    ("--vocab_size=500 --pretokenized", "use one of them"),
    ("--vocab_mb=0", "--vocab_mb"),
])
def test_bad_options(options, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fineweb.py", *options.split()])
    bad(capsys, fineweb.parse_args, says)


def test_no_text_and_no_name_are_one_line(monkeypatch, capsys):
    open("empty.txt", "w").close()
    for option, says in ("--vocab_size=257", "there are only 0 tokens"), ("--vocab=", "No such file"):
        monkeypatch.setattr(sys, "argv", ["fineweb.py", "--files=empty.txt", "--data_dir=d", "--num_proc=1", option])
        bad(capsys, fineweb.main, says)


def test_another_vocabulary_beside_the_shards_is_refused(own, tmp_path, monkeypatch, capsys):
    shutil.copytree(own / "own", "data")
    os.remove("data/vocab.tiktoken")
    for other in None, BYTE_VOCAB:
        if other:
            (tmp_path / "data/vocab.tiktoken").write_text(other)
        calls = [lambda: fineweb.vocab_of("data"), lambda: fineweb.check("data"),
                 lambda: train("gpt2", monkeypatch, *QUICK, "--data_dir=data")]
        for call in calls:
            bad(capsys, call, "data/vocab.tiktoken", "restore it")
    os.remove("data/progress.json")  # without it the largest token tells
    bad(capsys, lambda: train("gpt2", monkeypatch, *QUICK, "--data_dir=data"), "only 257")
    assert fineweb.check("data") == 1
    for path in tmp_path.glob("data/*.bin"):
        path.unlink()
    monkeypatch.setattr(sys, "argv", ["fineweb.py", f"--files={own}/docs.jsonl", "--data_dir=data"])
    bad(capsys, fineweb.main, "vocab.tiktoken but no progress.json")


# ---- training with it ------------------------------------------------------------------------------------------------

def bits_per_byte(folder, text, context):
    """Return lm-evaluation-harness's bits per byte of a text for an exported model."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
    from lm_eval.models.huggingface import HFLM
    lm = HFLM(pretrained=folder, device="cpu", batch_size=8, max_length=context)
    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    [log_likelihood] = lm.loglikelihood_rolling([request], disable_tqdm=True)
    assert weighted_perplexity([(log_likelihood, len(text.encode()))]) > 1
    return bits_per_byte([(log_likelihood, len(text.encode()))])


def test_a_run_needs_only_the_folder(own, tmp_path, monkeypatch, capsys):
    """The script takes the vocabulary from the folder and the checkpoint keeps it. An export carries it, and its bits
    per byte are those of the harness."""
    pytest.importorskip("lm_eval")
    from transformers import AutoTokenizer
    shutil.copytree(own / "own", "data")
    text = HELD_OUT[:5000]
    options = [*QUICK, "--data_dir=data", f"--val_bytes={len(text.encode())}", "--val_full_tokens=0"]
    train("llama", monkeypatch, *options)
    with open("log/llama-tiny/run.json") as file:
        info = json.load(file)
    assert info["config"]["vocab_size"] == 512
    digest = hashlib.sha256((tmp_path / "data/vocab.tiktoken").read_bytes()).hexdigest()
    assert info["vocab"] == {"name": "own", "tokens": SIZE, "sha256": digest}
    assert info["val_text"] == {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    bpb, val = stream_of("bpb", "log/llama-tiny"), stream_of("val", "log/llama-tiny")
    assert len(bpb) == len(val) == 3
    np.testing.assert_allclose(bpb, val / math.log(2) / info["bytes_per_token"], rtol=2e-3)
    assert "bits per byte" in capsys.readouterr().out

    vocab = fineweb.vocab_of("data")
    bad(capsys, lambda: train("llama", monkeypatch, *options, "--vocab_size=499", "--log_dir=x"),
        "--vocab_size=499 is less than the 500 tokens")
    shutil.rmtree("data")
    os.mkdir("data")
    fineweb.write_shard("data/x_val_000000.bin", tokens(5000, vocab=256).numpy())
    fineweb.write_shard("data/x_train_000001.bin", tokens(5000, vocab=256).numpy())
    (tmp_path / "data/vocab.tiktoken").write_text(BYTE_VOCAB)
    bad(capsys, lambda: train("llama", monkeypatch, *options, "--vocab_size=512", "--resume=auto", "--max_steps=9"),
        "another vocabulary than --data_dir=data")
    (tmp_path / "data/vocab.tiktoken").write_text("damaged")
    assert "data has only 5,000 bytes to validate on" in capsys.readouterr().out

    train("llama", monkeypatch, *options, "--sample=The old", "--max_new_tokens=5")
    assert capsys.readouterr().out.startswith("The old")
    shutil.rmtree("data")
    train("llama", monkeypatch, *options, "--export=exported")
    ours, theirs = fineweb.get_tokenizer(vocab, 512), AutoTokenizer.from_pretrained("exported")
    for each in TEXTS:
        assert theirs.encode(each.replace("<|endoftext|>", "")) == ours.encode_ordinary(
            each.replace("<|endoftext|>", ""))
    assert theirs.eos_token_id == ours.eot_token == SIZE - 1
    with open("exported/config.json") as file:
        assert json.load(file)["eos_token_id"] == SIZE - 1
    assert bits_per_byte("exported", text, 32) == pytest.approx(bpb[-1], abs=6e-5)


@pytest.mark.parametrize("vocab", [3, "YQ== 0\n", BYTE_VOCAB[:-20]])
def test_a_checkpoint_with_a_damaged_vocabulary_is_one_line(vocab, monkeypatch, capsys):
    model = SCRIPTS["gpt2"].Model(SCRIPTS["gpt2"].Config(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=320))
    checkpoint = {"arch": "gpt2", "step": 0, "config": vars(model.cfg), "model": model.state_dict(), "optimizer": {}}
    torch.save({**checkpoint, "vocab": vocab}, "x.pt")
    bad(capsys, lambda: train("gpt2", monkeypatch, "--sample=a", "--resume=x.pt"), "x.pt is not a readable checkpoint")


def test_bits_per_byte_leave_out_end_of_text():
    """The sums of each row are those of a loop over its targets; <|endoftext|> counts in the loss alone."""
    torch.manual_seed(0)
    cfg = SCRIPTS["gpt2"].Config(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=320)
    model = SCRIPTS["gpt2"].Model(cfg)
    row = [256, 65, 66, 256, 67, 256, 256, 68, 69]
    x, y = torch.tensor([row[:-1]]).repeat(2, 1), torch.tensor([row[1:]]).repeat(2, 1)
    y[0, -1] = -1  # padding
    y[1] = -1
    lengths = torch.zeros(320, dtype=torch.long)
    lengths[:257] = torch.from_numpy(fineweb.token_lengths(byte_tokenizer()))
    logits, _ = model(x)
    nats = [-logits[0, i].log_softmax(-1)[target].item() for i, target in enumerate(row[1:-1])]
    text = [nat for nat, target in zip(nats, row[1:-1]) if target != 256]
    assert (len(nats), len(text)) == (7, 4)
    expected = torch.tensor([[sum(nats), 7, sum(text), 4], [0, 0, 0, 0]])
    torch.testing.assert_close(common.row_losses(model, x, y, lengths).detach(), expected)


def test_the_same_bytes_in_two_vocabularies_are_the_same_text(own, gpt2_bpe):
    """--val_bytes evaluates on one text, whose bytes are counted to within a token."""
    found = {}
    for name, tokenizer in ("gpt2", gpt2_bpe), ("bytes", byte_tokenizer()):
        os.mkdir(name)
        ids = [i for text in TEXTS[:3] for i in [tokenizer.eot_token, *tokenizer.encode_ordinary(text)]]
        fineweb.write_shard(f"{name}/x_val_000000.bin", ids)
        found[name] = name, tokenizer, 50304 if name == "gpt2" else 320
    with open("bytes/vocab.tiktoken", "w") as file:
        file.write(BYTE_VOCAB)
    vocab = fineweb.vocab_of(own / "own")
    found["own"] = str(own / "own"), fineweb.get_tokenizer(vocab, 512), 512
    for n_bytes in 1, 1000, 20000:
        texts = set()
        for folder, tokenizer, vocab_size in found.values():
            cfg = SCRIPTS["gpt2"].Config(block_size=16, batch_size=4, vocab_size=vocab_size, data_dir=folder,
                                         val_bytes=n_bytes, val_full_tokens=0)
            loader = common.ShardLoader(cfg, "val", common.World(torch.device("cpu")), tokenizer)
            texts.add((loader.val_text["bytes"], loader.val_text["sha256"]))
            targets = torch.cat([y.flatten() for _, _, y in loader.val_batches(loader.val_tokens)])
            text = tokenizer.decode_bytes([i for i in targets.tolist() if i not in (-1, tokenizer.eot_token)])
            assert HELD_OUT.encode().startswith(text)
            assert 0 <= len(text) - n_bytes < 20
        assert texts == {(n_bytes, hashlib.sha256(HELD_OUT.encode()[:n_bytes]).hexdigest())}


def test_the_vocabulary_of_bytes_is_one_of_the_same_kind(own, monkeypatch, capsys):
    make_shards(own, "bytes", "--vocab_size=257")
    assert (own / "bytes/vocab.tiktoken").read_text() == BYTE_VOCAB
    ids = read_shards(own / "bytes")
    expected = [i for text in TEXTS for i in [256, *text.encode()]]
    assert ids.tolist() == expected
    train("gpt2", monkeypatch, *QUICK, f"--data_dir={own}/bytes", "--max_steps=1", "--eval_interval=1")
    assert trained_config()["vocab_size"] == 320


def trained_config(folder="log/gpt2-tiny"):
    """Return the options in a run's run.json."""
    with open(f"{folder}/run.json") as file:
        return json.load(file)["config"]
