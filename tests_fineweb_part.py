"""Tests of fineweb.py: no network, no GPU, a few seconds each."""
import gzip, http.server, io, json, lzma, os, random, re, resource, signal, subprocess, sys, threading, time, urllib.parse
import numpy as np
import pytest

ROOT = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, ROOT)
import fineweb

# ---- fineweb.py: text -> shards ----

@pytest.fixture(scope="session")
def bpe():
    try:
        import tiktoken
        return tiktoken.get_encoding("gpt2")
    except Exception as e:
        pytest.skip(f"GPT-2's BPE files are not to be had here: {type(e).__name__}: {e}")

def run_fineweb(*args, code=0, env=None, **kw):
    """Runs fineweb.py with small default sizes; returns (stdout, lines of stderr without tqdm's bars)."""
    r = subprocess.run([sys.executable, os.path.join(ROOT, "fineweb.py"), *map(str, args)], capture_output=True, text=True,
                       env={**os.environ, **(env or {})}, timeout=120, **kw)
    bars = r"it/s|B/s|tok/s|\d+%\||examples|\[00:|\[A"
    lines = [x for x in re.split(r"[\r\n]+", r.stderr) if x.strip() and not re.search(bars, x)]
    assert r.returncode == code, r.stderr
    return r.stdout, lines

def shards(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.bin"))}

def some_documents(n=120, seed=0):
    """Documents of all lengths, with everything that could trip a tokenizer."""
    rng = random.Random(seed)
    words = ["the", "Vogon", "naïve", "日本語", "😀", "x" * 50, "<|endoftext|>", "  ", "\n\n", "1234567", "don't", "\u0000", "\t"]
    docs = [" ".join(rng.choices(words, k=rng.choice([1, 3, 20, 300]))) for _ in range(n)]
    return docs[:5] + ["", " \n", "lone \ud800 surrogate", "word " * 5000] + docs[5:]

def expected_shards(bpe, docs, val, size, most=None):
    """The format, spelled out once more and independently of fineweb.py."""
    stream = [t for d in docs if d and d.strip() for t in [50256] + bpe.encode_ordinary(d)][:most]
    cuts = [0] + list(range(val, len(stream), size)) + [len(stream)]
    parts = [stream[a:b] for a, b in zip(cuts, cuts[1:]) if b > a]
    return {f"fineweb_{'train' if i else 'val'}_{i:06d}.bin":
            b"".join(x.to_bytes(4, "little") for x in [20240520, 1, len(p)] + [0] * 253) + np.array(p, "<u2").tobytes()
            for i, p in enumerate(parts)}

def jsonl(docs, column="text"):
    return "".join(json.dumps({"id": i, column: d}) + "\n" for i, d in enumerate(docs)).encode()

def test_import_starts_nothing():
    code = "import sys, fineweb; print(sorted({'torch', 'tiktoken', 'datasets', 'tqdm', 'common'} & set(sys.modules)))"
    r = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (r.stdout, r.stderr) == ("[]\n", "")

@pytest.mark.parametrize("procs", [1, 2])
@pytest.mark.parametrize("val, size, most", [(2000, 7001, None), (1, 97, 3000), (3000, 10**6, None), (2000, 500, 4000)])
def test_bytes(bpe, tmp_path, procs, val, size, most):
    docs = some_documents()
    (tmp_path / "a.jsonl").write_bytes(jsonl(docs))
    args = ["--files", tmp_path / "a.jsonl", "--val_tokens", val, "--shard_size", size, "--num_proc", procs,
            "--data_dir", tmp_path / "out"] + (["--max_tokens", most] if most else [])
    run_fineweb(*args)
    want = expected_shards(bpe, docs, val, size, most)
    assert len(want) > 1 and shards(tmp_path / "out") == want
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert "nothing to do" in run_fineweb(*args)[0] and shards(tmp_path / "out") == want

@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "ctrl-c"])
def test_killed_and_resumed(bpe, tmp_path, how):
    files = [tmp_path / f"{i}.jsonl.gz" for i in range(6)]  # several files: those read to the end are skipped later
    for i, f in enumerate(files):
        f.write_bytes(gzip.compress(jsonl(some_documents(250, seed=i)), 1))
    docs = [d for i in range(6) for d in some_documents(250, seed=i)]
    args = [sys.executable, os.path.join(ROOT, "fineweb.py"), "--files", *files, "--val_tokens", "1000", "--shard_size", "1500",
            "--num_proc", "2", "--data_dir", tmp_path / "out"]
    rng, resumed, workers = random.Random(how), 0, set()
    for _ in range(5):
        p = subprocess.Popen(args, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        before, end = len(shards(tmp_path / "out")), time.time() + 30
        resumed += before > 0
        while time.time() < end and p.poll() is None and len(shards(tmp_path / "out")) <= before + rng.randint(0, 20):
            time.sleep(0.01)
        workers |= children(p.pid)
        p.send_signal(how)
        out, err = p.communicate(timeout=30)
        if how == signal.SIGINT and p.returncode:
            assert "Traceback" not in err and err.rstrip().splitlines()[-1].startswith("fineweb.py: interrupted")
    end = time.time() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.time() < end:
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers), "a worker outlived its killed parent"
    assert resumed
    subprocess.run(args, check=True, capture_output=True)
    assert shards(tmp_path / "out") == expected_shards(bpe, docs, 1000, 1500)
    assert not list((tmp_path / "out").glob("*.tmp"))

def children(pid):
    try:
        return {int(x) for t in os.listdir(f"/proc/{pid}/task") for x in open(f"/proc/{pid}/task/{t}/children").read().split()}
    except OSError:
        return set()

def test_place_after_every_shard(bpe, tmp_path):
    """From each recorded place the rest comes out the same, wherever the cut fell (blank documents, document ends)."""
    docs = ["a b c", "", "d e", " ", "f", "g h i j k l m n o p"] * 9
    (tmp_path / "a.jsonl").write_bytes(jsonl(docs))
    args = ["--files", str(tmp_path / "a.jsonl"), "--val_tokens", "3", "--shard_size", "2", "--num_proc", "1"]
    full = expected_shards(bpe, docs, 3, 2)
    answers = iter([(np.concatenate([np.array([50256] + bpe.encode_ordinary(d)) for d in docs if d.strip()]),
                     [1 + len(bpe.encode_ordinary(d)) if d.strip() else 0 for d in docs], 0.5)])
    stream, place = fineweb.Stream(answers, 0, 0), {}
    for k in range(len(full)):
        place[k] = stream.more() and stream.place()
        list(stream.take(2 if k else 3))
    for k in (1, 2, 3, 4, 5, 6, len(full) - 1):
        out = tmp_path / f"from{k}"
        out.mkdir()
        for name in list(full)[:k]:
            (out / name).write_bytes(full[name])
        options = {**fineweb.Files([args[1]]).id, "shard_size": 2, "val_tokens": 3, "max_tokens": None}
        fineweb.save_progress(str(out), {"options": options, "shard": k, "document": place[k][0], "token": place[k][1],
                                         "counts": [], "tokens": 1 + 2 * k, "finished": False})
        if k in (3, len(full) - 1):
            run_fineweb(*args, "--data_dir", out)
            assert shards(out) == full

def zst(data):
    import pyarrow
    sink = io.BytesIO()
    with pyarrow.CompressedOutputStream(sink, "zstd") as f:
        f.write(data)
        f.flush()
        return sink.getvalue() if sink.closed else (f.close(), sink.getvalue())[1]

def parquet(docs, column="text"):
    import pyarrow as pa, pyarrow.parquet as pq
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(docs)), column: docs}), sink, row_group_size=50)
    return sink.getvalue()

@pytest.mark.parametrize("name, pack", [
    ("a.jsonl", jsonl), ("a.JSONL.gz", lambda d: gzip.compress(jsonl(d))), ("a.jsonl.xz", lambda d: lzma.compress(jsonl(d))),
    ("a.jsonl.zst", lambda d: zst(jsonl(d))), ("a.json", lambda d: json.dumps([{"text": x} for x in d], indent=1).encode()),
    ("a.json.gz", lambda d: gzip.compress(jsonl(d, "TEXT"))), ("a.parquet", lambda d: parquet(d, "Text")),
    ("a.txt", lambda d: "<|endoftext|>".join(d).encode()), ("a.txt.xz", lambda d: lzma.compress("<|endoftext|>".join(d).encode())),
    ("a.txt.zst", lambda d: zst("<|endoftext|>".join(d).encode())), ("a[1].jsonl", jsonl)])
def test_local_formats(bpe, tmp_path, name, pack):
    docs = [d.replace("<|endoftext|>", "eot").replace("\ud800", "\r\n") for d in some_documents()] + [""]
    (tmp_path / name).write_bytes(pack(docs))
    run_fineweb("--files", tmp_path / name, "--val_tokens", 500, "--shard_size", 4000, "--data_dir", tmp_path / "out")
    assert shards(tmp_path / "out") == expected_shards(bpe, docs, 500, 4000)

def test_order_of_files(bpe, tmp_path):
    for name in ("b2", "b1", "a1"):
        (tmp_path / f"{name}.txt").write_text(f"this is {name}")
    run_fineweb("--files", tmp_path / "b*.txt", tmp_path / "a1.txt", "--val_tokens", 2, "--data_dir", tmp_path / "out")
    assert shards(tmp_path / "out") == expected_shards(bpe, ["this is b1", "this is b2", "this is a1"], 2, 10**8)

def test_memory_of_a_long_document(bpe, tmp_path):
    (tmp_path / "a.txt").write_text("word salad, " * 10**6)  # 12 MB
    run = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
           "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")  # its workers included, KB
    r = subprocess.run([sys.executable, "-c", run, sys.executable, os.path.join(ROOT, "fineweb.py"), "--files", tmp_path / "a.txt",
                        "--shard_size", "100000", "--data_dir", tmp_path / "out"], capture_output=True, text=True, check=True)
    assert int(r.stdout.split()[-1]) < 400_000 and len(shards(tmp_path / "out")) > 30

def test_check(bpe, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    val, train = out / "fineweb_val_000000.bin", out / "fineweb_train_000001.bin"
    def good():
        fineweb.write_shard(str(val), [50256, 1, 2, 50256, 3])
        fineweb.write_shard(str(train), (x for x in ([4, 5], np.array([50256, 6]))))  # starts inside a document: fine
    def check(code):
        return run_fineweb("--check", "--data_dir", out, code=code)[0]
    good()
    assert "2 shards, 9 tokens, 0 bad" in check(0)
    def change(path, at, value):
        data = bytearray(path.read_bytes())
        data[at:at + len(value)] = value
        path.write_bytes(data)
    for damage in [lambda: change(train, 0, b"\0\0\0\0"), lambda: change(val, 4, b"\2\0\0\0"), lambda: change(val, 8, b"\4\0\0\0"),
                   lambda: change(train, 1024, np.array([50257], "<u2").tobytes()), lambda: change(val, 1024, b"\1\0"),
                   lambda: train.write_bytes(train.read_bytes()[:-1]), lambda: train.write_bytes(b""),
                   lambda: fineweb.write_shard(str(train), [])]:
        damage()
        table = check(1)
        assert "1 bad" in table and table.count("BAD") == 1, table
        good()
    val.unlink()
    assert "MISSING: 0" in check(1)

BAD = {  # files to make; options; what the one line must say
    "no match": ({}, "--files none*.txt", "none*.txt"),
    "unknown kind": ({"a.doc": b"x"}, "--files a.doc", "a.doc"),
    "not gzip": ({"a.jsonl.gz": b"hello"}, "--files a.jsonl.gz", "a.jsonl.gz"),
    "cut gzip": ({"a.txt.gz": gzip.compress(random.Random(0).randbytes(9999).hex().encode())[:-9]}, "--files a.txt.gz", "a.txt.gz"),
    "cut xz": ({"a.txt.xz": lzma.compress(b"hello" * 99)[:-9]}, "--files a.txt.xz", "a.txt.xz"),
    "not zst": ({"a.txt.zst": b"hello"}, "--files a.txt.zst", "a.txt.zst"),
    "not parquet": ({"a.parquet": b"hello"}, "--files a.parquet", "a.parquet"),
    "not utf-8": ({"a.txt": b"caf\xe9"}, "--files a.txt", "a.txt"),
    "bad json": ({"a.jsonl": b'{"text": "a"}\n\n{"text": \n'}, "--files a.jsonl", "a.jsonl line 3"),
    "bad array": ({"a.json": b'[{"text": "a"},'}, "--files a.json", "a.json"),
    "no field": ({"a.jsonl": b'{"text": "a"}\n{"id": 1, "body": "b"}\n'}, "--files a.jsonl", "line 2: no text column among: id, body"),
    "not an object": ({"a.jsonl": b'"a"\n'}, "--files a.jsonl", "a.jsonl line 1"),
    "not a string": ({"a.jsonl": b'{"text": 5}\n'}, "--files a.jsonl", "a.jsonl line 1"),
    "no column": ({"a.parquet": lambda: parquet(["x"], "body")}, "--files a.parquet", "no text column among: id, body"),
    "not text": ({"a.parquet": lambda: parquet([1, 2])}, "--files a.parquet", "int64"),
    "empty": ({"a.jsonl": b""}, "--files a.jsonl", "only 0 tokens"),
    "blank": ({"a.txt": b" \n"}, "--files a.txt", "only 0 tokens"),
    "small": ({"a.txt": b"hello world"}, "--files a.txt", "only 3 tokens"),
    "no train": ({"a.txt": b"hello world"}, "--files a.txt --val_tokens 3", "only 3 tokens"),
    "max <= val": ({"a.txt": b"a"}, "--files a.txt --val_tokens 5 --max_tokens 5", "--max_tokens 5"),
    "negative": ({}, "--max_tokens -5", "--max_tokens"),
    "zero": ({}, "--num_proc 0", "--num_proc"),
    "no number": ({}, "--shard_size big", "--shard_size"),
    "too big": ({"a.txt": b"a"}, "--files a.txt --shard_size 3000000000", "--shard_size"),
    "unknown option": ({}, "--sharad_size 5", "--sharad_size"),
    "two sources": ({"a.txt": b"a"}, "--files a.txt --dataset b", "--files"),
    "not a folder": ({"a.txt": b"a b c", "out": b""}, "--files a.txt --val_tokens 2", "out"),
    "nothing to check": ({}, "--check", "--data_dir"),
    "foreign shards": ({"a.txt": b"a b c", "out/fineweb_val_000000.bin": b""}, "--files a.txt --val_tokens 2", "progress.json"),
    "broken progress": ({"a.txt": b"a b c", "out/progress.json": b"{"}, "--files a.txt --val_tokens 2", "progress.json"),
    "no network": ({}, "--dataset no/such", "--dataset no/such"),
    "no network 2": ({}, "--pretokenized", "kjj0/fineweb10B-gpt2"),
}

@pytest.mark.parametrize("case", BAD)
def test_bad_input(bpe, tmp_path, case):
    files, options, says = BAD[case]
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data() if callable(data) else data)
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1" if "no/such" in options else "0"}
    _, err = run_fineweb("--data_dir", "out", *options.split(), code=1, env=env, cwd=tmp_path)
    assert len(err) == 1 and err[0].startswith("fineweb.py: ") and says in err[0], err
    assert case == "foreign shards" or not list(tmp_path.glob("out/*.bin")) + list(tmp_path.glob("out/*.tmp"))

def test_other_options_are_refused_and_harmless(bpe, tmp_path):
    (tmp_path / "a.txt").write_text("a b c d e f g")
    (tmp_path / "b.txt").write_text("a b c d e f g h")
    def args(file="a.txt", val=2, size=3):
        return ["--files", file, "--val_tokens", val, "--shard_size", size, "--data_dir", "out"]
    assert "only 8 tokens" in run_fineweb(*args(val=99), code=1, cwd=tmp_path)[1][0]
    run_fineweb(*args(), cwd=tmp_path)  # nothing was finished before, so other options are welcome
    before = shards(tmp_path / "out")
    for other, says in ((args(size=4), "--shard_size 3"), (args(val=3), "--val_tokens 2"), (args("b.txt"), "--files"),
                        (args() + ["--max_tokens", 5], "--max_tokens None")):
        _, err = run_fineweb(*other, code=1, cwd=tmp_path)
        assert len(err) == 1 and says in err[0]
        assert shards(tmp_path / "out") == before

def test_disk_full(bpe, tmp_path):
    """A file-size limit stands in for a full disk: the finished shard stays, the unfinished one goes, the rest follows."""
    docs = some_documents()
    (tmp_path / "a.jsonl").write_bytes(jsonl(docs))
    args = ["--files", tmp_path / "a.jsonl", "--val_tokens", 1000, "--shard_size", 10000, "--data_dir", tmp_path / "out"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
    _, err = run_fineweb(*args, code=1, preexec_fn=limit)
    assert len(err) == 1 and "File too large" in err[0]
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == ["fineweb_val_000000.bin", "progress.json"]
    run_fineweb(*args)
    assert shards(tmp_path / "out") == expected_shards(bpe, docs, 1000, 10000)

# ---- fineweb.py and the hub: a stand-in for huggingface.co on the loopback ----

class Hub(http.server.BaseHTTPRequestHandler):
    repos, log = {}, []  # "owner/name" -> {path: bytes}; requests for contents
    protocol_version = "HTTP/1.1"

    def answer(self, body=b"", code=200, **headers):
        self.send_response(code)
        for k, v in {"Content-Length": len(body), "X-Repo-Commit": "c" * 40, **headers}.items():
            self.send_header(k.replace("_", "-"), str(v))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        url = urllib.parse.unquote(self.path.partition("?")[0])
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        m = re.match(r"(?:/api)?/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info|resolve)/[^/]+)?(?:/(.+))?$", url)
        if not m or m[1] not in self.repos:
            return self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
        repo, kind, path = m.groups()
        files = self.repos[repo]
        entries = [{"type": "file", "path": p, "size": len(b), "oid": "0" * 40} for p, b in files.items()]
        if kind == "resolve":
            if path not in files:
                return self.answer(b"", 404, X_Error_Code="EntryNotFound")
            if self.command == "GET":
                self.log.append(path)
            first, last = (re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "bytes=0-")).groups()
            part = files[path][int(first):int(last) + 1 if last else None]
            span = {"Content_Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(files[path])}"} if self.headers.get("Range") else {}
            return self.answer(part, 206 if span else 200, ETag=f'"{hash(files[path]):x}"', Accept_Ranges="bytes", **span)
        if kind == "tree":
            reply = [e for e in entries if not path or e["path"].startswith(path + "/")]
        elif kind == "paths-info":
            wanted = json.loads(sent)["paths"] if sent.startswith("{") else urllib.parse.parse_qs(sent)["paths"]
            reply = [e for e in entries if e["path"] in wanted]
        else:
            reply = {"_id": "0" * 24, "id": repo, "sha": "c" * 40, "private": False, "disabled": False, "gated": False, "downloads": 0,
                     "likes": 0, "tags": [], "siblings": [{"rfilename": p} for p in files]}
        self.answer(json.dumps(reply).encode(), Content_Type="application/json")

    do_HEAD = do_POST = do_GET

    def log_message(self, *args):
        pass

@pytest.fixture
def hub(tmp_path):
    Hub.repos, Hub.log = {}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    server.shutdown()
    server.server_close()

def test_hub(bpe, tmp_path, hub):
    docs = [d.replace("\ud800", "") for d in some_documents(300)]
    Hub.repos["some/set"] = {"data/train-00000.parquet": parquet(docs[:200], "TEXT"), "data/train-00001.parquet": parquet(docs[200:], "TEXT")}
    Hub.repos["some/images"] = {"data/train-00000.parquet": parquet(docs[:20], "caption")}
    want = expected_shards(bpe, docs, 1000, 5000)
    args = ["--dataset", "some/set", "--val_tokens", 1000, "--shard_size", 5000]
    total = sum(np.frombuffer(b[:12], "<i4")[2] for b in want.values())
    for out, more in (("whole", []), ("streamed", ["--max_tokens", total + 1])):
        run_fineweb(*args, *more, "--data_dir", tmp_path / out, env=hub)
        assert shards(tmp_path / out) == want, out
    for out in ("whole", "streamed"):  # resumed from shard 3
        path = tmp_path / out / "progress.json"
        progress = json.loads(path.read_text())
        for name in list(want)[2:]:
            (tmp_path / out / name).unlink()
        flat = [0] + list(np.cumsum([1 + len(bpe.encode_ordinary(d)) if d.strip() else 0 for d in docs]))
        document = int(np.searchsorted(flat, 6000, side="right")) - 1
        path.write_text(json.dumps(progress | {"shard": 2, "document": document, "token": int(6000 - flat[document]), "tokens": 6000,
                                               "finished": False}))
        run_fineweb(*args, *(["--max_tokens", total + 1] if out == "streamed" else []), "--data_dir", tmp_path / out, env=hub)
        assert shards(tmp_path / out) == want, out
    for options, says in ((["--dataset", "some/images"], "no text column among: id, caption"), (["--dataset", "no/such"], "no/such"),
                          (["--dataset", "some/set", "--split", "test"], "--split"), (["--dataset", "some/set", "--name", "x"], "--name")):
        _, err = run_fineweb(*options, "--data_dir", tmp_path / "bad", env=hub, code=1)
        assert len(err) == 1 and err[0].startswith("fineweb.py: ") and says in err[0], err

def test_pretokenized(tmp_path, hub):
    def shard(n, seed):
        path = tmp_path / "shard"
        fineweb.write_shard(str(path), [50256] + [seed] * (n - 1))
        return path.read_bytes()
    Hub.repos["kjj0/fineweb10B-gpt2"] = there = {"README.md": b"x", "fineweb_val_000000.bin": shard(100, 0),
        **{f"fineweb_train_{i:06d}.bin": shard(100, i) for i in (2, 1, 3)}}
    Hub.repos["kjj0/finewebedu10B-gpt2"] = {"finewebedu_val_000000.bin": shard(90, 0), "finewebedu_train_000001.bin": shard(90, 1)}
    out = tmp_path / "out"
    run_fineweb("--pretokenized", "--max_tokens", 250, "--data_dir", out, env=hub)
    assert list(shards(out)) == ["fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin"]
    (out / "fineweb_train_000002.bin").write_bytes(b"half")
    Hub.log.clear()
    run_fineweb("--pretokenized", "--data_dir", out, env=hub)
    assert shards(out) == {k: v for k, v in sorted(there.items()) if k.endswith(".bin")}
    assert sorted(Hub.log) == ["fineweb_train_000002.bin", "fineweb_train_000003.bin"]  # only what was not whole
    run_fineweb("--check", "--data_dir", out)
    run_fineweb("--pretokenized", "--dataset", "kjj0/finewebedu10B-gpt2", "--data_dir", tmp_path / "edu", env=hub)
    assert list(shards(tmp_path / "edu")) == ["fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    Hub.repos["some/empty"] = {"README.md": b"x"}
    for repo in ("some/empty", "no/such"):
        _, err = run_fineweb("--pretokenized", "--dataset", repo, "--data_dir", tmp_path / "bad", env=hub, code=1)
        assert len(err) == 1 and repo in err[0]
