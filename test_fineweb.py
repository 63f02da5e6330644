"""
fineweb.py, which turns text into shards, is checked on a CPU: the bytes of the shards from every kind of file and from
a hub, kills and resumed runs, a full disk, two writers, memory, the names of shards, --check, and bad input.

    pytest -q test_fineweb.py                              # this file alone; test_models.py says what to install
    pytest -q test_fineweb.py -k "hub or pretokenized"     # the hub
    pytest -q test_fineweb.py -k bad_input                 # the errors

The reference is the format spelled out once more in `expected_shards`, with tiktoken's GPT-2 BPE. A server on the
loopback stands in for huggingface.co, so no test needs a network, except that GPT-2's BPE must be in TIKTOKEN_CACHE_DIR
or be downloaded: tests that need it are skipped where it cannot be loaded.
"""
import base64
import contextlib
import errno
import fcntl
import gzip
import io
import json
import lzma
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.parse

import numpy as np
import pytest

import fineweb
from conftest import QUICK, ROOT, Answer, bad, serve, shards, shell

FINEWEB = [sys.executable, os.path.join(ROOT, "fineweb.py")]
# matches tqdm's bars
BARS = re.compile(r"it/s|B/s|tok/s|\d+%\||examples|\[00:|\[A")


def run_fineweb(*args, code=0, env=None, **options):
    """Run fineweb.py, which must end with an exit code; return (stdout, lines of stderr without tqdm's bars)."""
    result = subprocess.run([*FINEWEB, *map(str, args)], capture_output=True, text=True, timeout=120,
                            env={**os.environ, **(env or {})}, **options)
    assert result.returncode == code, result.stderr
    lines = re.split(r"[\r\n]+", result.stderr)
    return result.stdout, [line for line in lines if line.strip() and not BARS.search(line)]


def assert_one_line(errors, says):
    """Assert that stderr was one line of fineweb.py that says something."""
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: ") and errors[0].count("error: ") == 1, errors
    assert says in errors[0], errors


def shard_bytes(folder):
    """Return the contents of the shards of a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))}


def some_documents(n=120, seed=0):
    """Return documents of all lengths, with everything that could trip a tokenizer."""
    rng = random.Random(seed)
    words = ["the", "Vogon", "naïve", "日本語", "😀", "x" * 50, "<|endoftext|>", "  ", "\n\n", "1234567", "don't",
             "\u0000", "\t"]
    docs = [" ".join(rng.choices(words, k=rng.choice([1, 3, 20, 300]))) for _ in range(n)]
    return docs[:5] + ["", " \n", "lone \ud800 surrogate", "word " * 5000] + docs[5:]


def document_tokens(gpt2_bpe, doc):
    """Return the tokens of a document: <|endoftext|> and its text, or nothing for a blank document."""
    if not doc or not doc.strip():
        return []
    return [50256, *gpt2_bpe.encode_ordinary(doc)]


def expected_shards(gpt2_bpe, docs, val, size, most=None):
    """Return what shard_bytes must find: the format, spelled out once more and independently of fineweb.py."""
    stream = []
    for doc in docs:
        stream += document_tokens(gpt2_bpe, doc)
    stream = stream[:most]
    cuts = [0, *range(val, len(stream), size), len(stream)]
    parts = [stream[begin:end] for begin, end in zip(cuts, cuts[1:]) if end > begin]
    shards = {}
    for i, part in enumerate(parts):
        split = "train" if i else "val"
        header = [20240520, 1, len(part)] + [0] * 253
        header_bytes = b"".join(number.to_bytes(4, "little") for number in header)
        shards[f"fineweb_{split}_{i:06d}.bin"] = header_bytes + np.array(part, "<u2").tobytes()
    return shards


# ---- kinds of files --------------------------------------------------------------------------------------------------

def jsonl(docs, column="text"):
    """Return documents as JSON lines."""
    return "".join(json.dumps({"id": i, column: doc}) + "\n" for i, doc in enumerate(docs)).encode()


def json_array(docs):
    """Return documents as one JSON array over many lines."""
    return json.dumps([{"text": doc} for doc in docs], indent=1).encode()


def txt(docs):
    """Return documents as plain text."""
    return "<|endoftext|>".join(docs).encode()


def zst(data):
    """Compress bytes by zstandard."""
    import pyarrow
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as f:
        f.write(data)
    return sink.getvalue().to_pybytes()


def parquet(docs, column="text", kind=None, **more):
    """Return documents as a parquet file in several row groups.

    kind: the name of their Arrow type, by default what pyarrow infers. more: other columns."""
    import pyarrow
    import pyarrow.parquet
    types = {
        "dictionary": lambda: pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        "struct": lambda: pyarrow.struct({"content": pyarrow.string()}),
    }
    arrow_type = types[kind]() if kind in types else kind and getattr(pyarrow, kind)()
    sink = io.BytesIO()
    table = pyarrow.table({"id": range(len(docs)), column: pyarrow.array(docs, arrow_type), **more})
    pyarrow.parquet.write_table(table, sink, row_group_size=50)
    return sink.getvalue()


# ---- text to shards --------------------------------------------------------------------------------------------------

def test_import_starts_nothing():
    code = "import sys, fineweb; print(sorted({'torch', 'tiktoken', 'datasets', 'tqdm', 'common'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")


@pytest.mark.parametrize("procs", [1, 2])
@pytest.mark.parametrize("val, size, most", [(2000, 7001, None), (1, 97, 3000), (3000, 10**6, None), (2000, 500, 4000)])
def test_bytes(gpt2_bpe, tmp_path, procs, val, size, most):
    docs = some_documents()
    (tmp_path / "a.jsonl").write_bytes(jsonl(docs))
    out = tmp_path / "out"
    args = ["--files", tmp_path / "a.jsonl", "--val_tokens", val, "--shard_size", size, "--num_proc", procs,
            "--data_dir", out]
    if most:
        args += ["--max_tokens", most]
    run_fineweb(*args)
    expected = expected_shards(gpt2_bpe, docs, val, size, most)
    assert len(expected) > 1
    assert shard_bytes(out) == expected
    assert not list(out.glob("*.tmp"))
    stdout, _ = run_fineweb(*args)
    assert "nothing to do" in stdout
    assert shard_bytes(out) == expected


def children(pid):
    """Return the process ids of a process's children; none where it has ended."""
    found = set()
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as f:
                found |= {int(child) for child in f.read().split()}
    except OSError:
        return set()
    return found


def test_killed_and_resumed(gpt2_bpe, tmp_path):
    out = tmp_path / "out"
    files = [tmp_path / f"{i}.jsonl.gz" for i in range(6)]  # several files: those read to the end are skipped later
    docs = []
    for i, file in enumerate(files):
        file_docs = some_documents(250, seed=i)
        docs += file_docs
        file.write_bytes(gzip.compress(jsonl(file_docs), 1))
    command = [*FINEWEB, "--files", *files, "--val_tokens", "1000", "--shard_size", "5000", "--num_proc", "2",
               "--data_dir", out]
    rng = random.Random()
    resumed = 0
    workers = set()
    for how in signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGKILL:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                   start_new_session=True)
        before = len(shard_bytes(out))
        resumed += before > 0
        deadline = time.time() + 30
        while (time.time() < deadline and process.poll() is None
               and len(shard_bytes(out)) <= before + rng.randint(0, 20)):
            time.sleep(0.01)
        workers |= children(process.pid)
        with contextlib.suppress(ProcessLookupError):
            if how == signal.SIGINT:
                os.killpg(process.pid, how)  # Ctrl-C reaches the whole group
            else:
                os.kill(process.pid, how)  # kill -9 reaches the parent only
        _, stderr = process.communicate(timeout=30)
        if how == signal.SIGINT and process.returncode:
            assert "Traceback" not in stderr
            *_, last_line = stderr.rstrip().splitlines()
            assert last_line.startswith("error: interrupted")

    def living():
        return [pid for pid in workers if os.path.exists(f"/proc/{pid}")]

    deadline = time.time() + 10
    while living() and time.time() < deadline:
        time.sleep(0.1)
    assert not living(), "a worker outlived its killed parent"
    assert resumed
    subprocess.run(command, check=True, capture_output=True)
    assert shard_bytes(out) == expected_shards(gpt2_bpe, docs, 1000, 5000)
    assert not list(out.glob("*.tmp"))


def test_place_after_every_shard(gpt2_bpe, tmp_path):
    """From each recorded place the rest comes out the same, wherever the cut fell (blank documents, document ends)."""
    docs = ["a b c", "", "d e", " ", "f", "g h i j k l m n o p"] * 9
    file = str(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(jsonl(docs))
    full = expected_shards(gpt2_bpe, docs, 3, 2)
    # the place before each shard, from one answer that holds all documents
    documents = [document_tokens(gpt2_bpe, doc) for doc in docs]
    answer = np.concatenate([np.array(doc, dtype=np.int64) for doc in documents]), list(map(len, documents)), 0.5
    reader = fineweb.TokenReader(iter([answer]), 0, 0)
    places = []
    for shard in range(len(full)):
        assert reader.has_next()
        places.append(reader.position())
        list(reader.take(2 if shard else 3))
    for shard in 4, len(full) - 1:
        out = tmp_path / f"from{shard}"
        out.mkdir()
        for name in list(full)[:shard]:
            (out / name).write_bytes(full[name])
        document, token = places[shard]
        progress = {
            "options": {**fineweb.Files([file]).id, "shard_size": 2, "val_tokens": 3, "max_tokens": None},
            "shard": shard,
            "document": document,
            "token": token,
            "counts": [],
            "tokens": 1 + 2 * shard,
            "finished": False,
        }
        fineweb.save_progress(str(out), progress)
        run_fineweb("--files", file, "--val_tokens", 3, "--shard_size", 2, "--num_proc", 1, "--data_dir", out)
        assert shard_bytes(out) == full


@pytest.mark.parametrize("name, pack", [
    ("a.jsonl", jsonl),
    ("a.JSONL.gz", lambda docs: gzip.compress(jsonl(docs))),
    ("a.jsonl.xz", lambda docs: lzma.compress(jsonl(docs))),
    ("a.jsonl.zst", lambda docs: zst(jsonl(docs))),
    ("a.json", lambda docs: json_array(docs)),
    ("a.json.gz", lambda docs: gzip.compress(jsonl(docs, "TEXT"))),
    ("a.parquet", lambda docs: parquet(docs, "Text")),
    ("large.parquet", lambda docs: parquet(docs, kind="large_string")),
    ("view.parquet", lambda docs: parquet(docs, kind="string_view")),
    ("dictionary.parquet", lambda docs: parquet(docs, kind="dictionary")),
    ("exact.parquet", lambda docs: parquet(docs, Text=docs[::-1], TEXT=docs[::-1])),
    ("exact.jsonl", lambda docs: b"".join(
        json.dumps({"TEXT": "no", "Text": "no", "text": doc}).encode() + b"\n" for doc in docs)),
    ("a.txt", txt),
    ("a.txt.xz", lambda docs: lzma.compress(txt(docs))),
    ("a.txt.zst", lambda docs: zst(txt(docs))),
    ("a[1].jsonl", jsonl),
])
def test_local_formats(gpt2_bpe, tmp_path, name, pack):
    docs = [doc.replace("<|endoftext|>", "eot").replace("\ud800", "\r\n") for doc in some_documents()] + [""]
    (tmp_path / name).write_bytes(pack(docs))
    run_fineweb("--files", tmp_path / name, "--val_tokens", 500, "--shard_size", 4000, "--data_dir", tmp_path / "out")
    assert shard_bytes(tmp_path / "out") == expected_shards(gpt2_bpe, docs, 500, 4000)


def test_order_of_files(gpt2_bpe, tmp_path):
    for name in "b2", "b1", "a1":
        (tmp_path / f"{name}.txt").write_text(f"this is {name}")
    run_fineweb("--files", tmp_path / "b*.txt", tmp_path / "a1.txt", "--val_tokens", 2, "--data_dir", tmp_path / "out")
    docs = ["this is b1", "this is b2", "this is a1"]
    assert shard_bytes(tmp_path / "out") == expected_shards(gpt2_bpe, docs, 2, 10**8)


def test_pieces_have_the_same_tokens(gpt2_bpe):
    """Texts are cut only where no token changes: checked with short runs, which tiktoken takes whole."""
    rng = random.Random(0)
    white = [chr(code) for code in range(0x110000) if chr(code).isspace()] + ["\u180e", "\u200b", "\ufeff"]
    units = [*white, *"  \n\n\t ab'sZ1９é日.,=!\u0301\0😀", "'s", "'ll", "n't", " don't ", "<|endoftext|>"]
    cuts = 0
    for _ in range(20000):
        text = "".join(rng.choice(units) * rng.choice([1, 1, 2, 3, 7]) for _ in range(rng.randint(1, 25)))
        pieces = list(fineweb.pieces_of(text, long=2))
        assert "".join(pieces) == text
        tokens = [token for piece in pieces for token in gpt2_bpe.encode_ordinary(piece)]
        assert tokens == gpt2_bpe.encode_ordinary(text)
        cuts += len(pieces) - 1
    assert cuts > 20000
    assert list(fineweb.pieces_of("a" + " " * 99_999 + "b")) == ["a" + " " * 99_999 + "b"]


@pytest.mark.parametrize("blank", [" ", "\n", "\u00a0", "\u3000", " \r\n", "\u2003 \t"])
def test_a_million_blanks(gpt2_bpe, tmp_path, blank):
    """tiktoken fails at such a run in front of a word. It is cut by hand here, before its last blank."""
    begin, end = "x\ud800" + (blank * 1_200_000)[:1_199_999], blank[1_199_999 % len(blank)] + "word"
    # the last: what tiktoken takes as it is
    texts = ["before", begin + end, end + begin, blank * 1_200_000, "a" * 1_200_000 + "=" * 1_200_000]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    run_fineweb("--files", tmp_path / "a.jsonl", "--val_tokens", 2, "--num_proc", 1, "--data_dir", tmp_path / "out")
    stream = [50256, *gpt2_bpe.encode_ordinary("before")]
    stream += [50256, *gpt2_bpe.encode_ordinary(begin), *gpt2_bpe.encode_ordinary(end)]
    stream += [50256, *gpt2_bpe.encode_ordinary(end + begin), 50256, *gpt2_bpe.encode_ordinary(texts[-1])]
    assert fineweb.open_shard(str(tmp_path / "out" / "fineweb_val_000000.bin")).tolist() == stream[:2]
    assert fineweb.open_shard(str(tmp_path / "out" / "fineweb_train_000001.bin")).tolist() == stream[2:]


# a tokenizer that fails at some words, as tiktoken's Rust code does: a panic is no Exception, nor can it be pickled
FAILING_TIKTOKEN = """
import os
import numpy

class Encoding:
    eot_token = 50256

    def encode_to_numpy(self, text, disallowed_special):
        class PanicException(BaseException):
            pass
        if "panic" in text:
            raise PanicException("stack\\noverflow")
        if "unforeseen" in text:
            raise KeyError(text)
        if "dies" in text:
            os._exit(1)
        return numpy.zeros(len(text), numpy.uint32)

def get_encoding(name):
    return Encoding()
"""


@pytest.mark.parametrize("word, says", [
    ("panic", "b.jsonl document 301 cannot be tokenized (PanicException: stack overflow); leave it out"),
    ("unforeseen", "b.jsonl document 301 cannot be tokenized (KeyError: 'unforeseen'); leave it out"),
    ("dies", "a worker died"),
])
@pytest.mark.parametrize("procs", [1, 2])
def test_errors_of_workers(tmp_path, word, says, procs):
    """Whatever goes wrong in a worker is one line that names the file and the document."""
    # without bytecode, which Python would take from the module before its repair in the same second
    env = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    (tmp_path / "tiktoken.py").write_text(FAILING_TIKTOKEN)
    for name, texts in ("a", ["x"] * 700), ("b", ["", *["y"] * 299, word, *["z"] * 5000]), ("c", ["x"]):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(texts))
    _, errors = run_fineweb("--files", "*.jsonl", "--val_tokens", 50, "--shard_size", 100, "--num_proc", procs,
                            "--data_dir", "out", code=1, cwd=tmp_path, env=env)
    assert_one_line(errors, says)
    # what was finished stays, and after the repair it goes on
    (tmp_path / "tiktoken.py").write_text(FAILING_TIKTOKEN.replace(word, "never"))
    run_fineweb("--files", "*.jsonl", "--val_tokens", 50, "--shard_size", 100, "--num_proc", procs, "--data_dir",
                "out", cwd=tmp_path, env=env)
    total = sum(len(fineweb.open_shard(str(path))) for path in (tmp_path / "out").glob("*.bin"))
    assert total == (700 + 299 + 5000 + 1) * 2 + 1 + len(word)


def test_unforeseen_errors_between_documents():
    class Source:
        fraction = None

        def read(self, start):
            yield "a"
            raise KeyError("unforeseen")

        def place(self, document):
            return f"place {document}"

    with pytest.raises(SystemExit) as e:
        list(fineweb.tokenized(Source(), 7, "", 1))
    assert e.value.code == "error: stopped at place 7 or soon after it (KeyError: 'unforeseen')"


def test_a_folder(gpt2_bpe, tmp_path):
    """A folder means the files of known types in and below it, in sorted order; the shards may lie in it, too."""
    books = tmp_path / "bo[o]ks"
    texts = {"c.txt": "this is c", "B.TXT": "this is B", "a/z.txt": "this is z"}
    texts["a/b/a.jsonl"] = jsonl(["this is a"]).decode()
    others = {"cover.png": "x", "a/notes.md": "x", ".hidden.txt": "x", ".git/a.txt": "x"}
    for name, text in {**texts, **others}.items():
        (books / name).parent.mkdir(parents=True, exist_ok=True)
        (books / name).write_text(text)
    (tmp_path / "first.txt").write_text("this is first")
    (books / "a" / "loop").symlink_to(books)
    args = ["--files", tmp_path / "first.txt", books, books / "c.txt", "--val_tokens", 2, "--shard_size", 9,
            "--data_dir", books / "shards"]
    stdout, _ = run_fineweb(*args)
    # the two others are cover.png and notes.md: hidden ones do not count
    assert f"--files {books}: 4 files; 2 of other types are passed over\n" in stdout
    docs = ["this is first", "this is B", "this is a", "this is z", "this is c"]
    expected = expected_shards(gpt2_bpe, docs, 2, 9)
    assert shard_bytes(books / "shards") == expected
    stdout, _ = run_fineweb(*args)
    assert "nothing to do" in stdout


def test_an_unreadable_folder_is_not_passed_over(tmp_path, monkeypatch):
    """os.walk alone would leave out a folder that it cannot list, without a word."""
    scandir = os.scandir

    def no_permission(path):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    (tmp_path / "locked").mkdir()
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(os, "scandir", no_permission)
    with pytest.raises(SystemExit) as e:
        fineweb.Files([str(tmp_path)])
    assert e.value.code.startswith(f"error: --files {tmp_path}: [Errno 13] Permission denied")


def zst_with_window(data, log):
    """Return bytes in zstd's format (RFC 8878): a frame with a window of 2**log bytes and one uncompressed block."""
    window, block = bytes([log - 10 << 3]), (len(data) << 3 | 1).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd\0" + window + block + data


def test_zst_with_a_large_window(gpt2_bpe, tmp_path):
    docs = some_documents(20)
    half = len(docs) // 2
    data = zst_with_window(jsonl(docs[:half]), 31) + zst_with_window(jsonl(docs[half:]), 31)  # several frames, too
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    args = ["--files", tmp_path / "a.jsonl.zst", "--val_tokens", 500, "--shard_size", 4000, "--data_dir"]
    if sys.version_info < (3, 14):
        (tmp_path / "without").mkdir()  # a folder that hides the package
        (tmp_path / "without" / "backports.py").write_text("raise ImportError")
        _, errors = run_fineweb(*args, tmp_path / "out", code=1, env={"PYTHONPATH": str(tmp_path / "without")})
        assert_one_line(errors, "pip install backports.zstd, or decompress it with zstd -d --long=31")
        pytest.importorskip("backports.zstd")
    run_fineweb(*args, tmp_path / "out")
    assert shard_bytes(tmp_path / "out") == expected_shards(gpt2_bpe, docs, 500, 4000)


# prints the most memory that a command or one of its workers has used, in KB
MEASURE_MEMORY = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def test_memory_of_a_long_document(gpt2_bpe, tmp_path):
    (tmp_path / "a.txt").write_text("word salad, " * 10**6)  # 12 MB
    command = [*FINEWEB, "--files", tmp_path / "a.txt", "--shard_size", "100000", "--data_dir", tmp_path / "out"]
    measure = [sys.executable, "-c", MEASURE_MEMORY]
    result = subprocess.run([*measure, *command], capture_output=True, text=True, check=True)
    *_, kilobytes = result.stdout.split()
    assert int(kilobytes) < 400_000
    assert len(shard_bytes(tmp_path / "out")) > 30


def test_check(gpt2_bpe, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    val = out / "fineweb_val_000000.bin"
    train = out / "fineweb_train_000001.bin"

    def write_good_shards():
        fineweb.write_shard(str(val), [50256, 1, 2, 50256, 3])
        pieces = [4, 5], np.array([50256, 6])  # starts inside a document, which is fine
        fineweb.write_shard(str(train), (piece for piece in pieces))

    def check(code):
        stdout, _ = run_fineweb("--check", "--data_dir", out, code=code)
        return stdout

    def change(path, at, value):
        data = bytearray(path.read_bytes())
        data[at:at + len(value)] = value
        path.write_bytes(data)

    write_good_shards()
    assert "2 shards, 9 tokens, 0 bad" in check(0)
    second_val = out / "fineweb_val_000001.bin"
    fineweb.write_shard(str(second_val), [4, 5])  # continues the last document of the first, which is fine
    assert "3 shards, 11 tokens, 0 bad" in check(0)
    second_val.unlink()
    damages = [
        lambda: change(train, 0, b"\0\0\0\0"),  # magic number
        lambda: change(val, 4, b"\2\0\0\0"),  # version
        lambda: change(val, 8, b"\4\0\0\0"),  # number of tokens
        lambda: change(train, 1024, np.array([50257], "<u2").tobytes()),  # not in the vocabulary
        lambda: change(val, 1024, b"\1\0"),  # starts inside a document
        lambda: train.write_bytes(train.read_bytes()[:-1]),
        lambda: train.write_bytes(b""),
        lambda: fineweb.write_shard(str(train), []),
    ]
    for damage in damages:
        damage()
        table = check(1)
        assert "1 bad" in table
        assert table.count("BAD") == 1, table
        write_good_shards()
    val.unlink()
    assert "MISSING: 0" in check(1)


# names of published sets -> the order of the train shards
FOREIGN = {
    "llm.c tinyshakespeare": (["tiny_shakespeare_val.bin", "tiny_shakespeare_train.bin"], [1]),
    "llm.c tinystories": (["TinyStories_val.bin", "TinyStories_train.bin"], [1]),
    "llm.c fineweb": (["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"], [1, 2]),
    "modded-nanogpt": (
        ["finewebedu_val_000000.bin", "finewebedu_train_000001.bin", "finewebedu_train_000002.bin"], [1, 2]),
    "parameter-golf": (["fineweb_val_000000.bin", "fineweb_train_000000.bin", "fineweb_train_000001.bin"], [1, 2]),
    "unpadded": (["x_val_1.bin", "x_train_10.bin", "x_train_9.bin", *(f"x_train_{i}.bin" for i in range(1, 9))],
                 [3, 4, 5, 6, 7, 8, 9, 10, 2, 1]),
    "a word within a word": (["retrieval_val_0.bin", "retrieval_train_1.bin"], [1]),
    "longer words": (["validation-00.bin", "Training-00.bin"], [1]),
    "no numbers": (["val.bin", "train.bin"], [1]),
    "some numbers": (["val.bin", "b_train.bin", "a_train_1.bin"], [2, 1]),
}


@pytest.mark.parametrize("which", FOREIGN)
def test_foreign_names(tmp_path, which):
    """Published sets of shards are read as they are: by split, in the order of their numbers, without complaint."""
    names, order = FOREIGN[which]
    folder = tmp_path / "data2"
    folder.mkdir()
    for token, name in enumerate(names):
        fineweb.write_shard(str(folder / name), [50256, token])
    train = fineweb.open_shards(str(folder), "train", 50257)
    assert train.read(0, len(train)).tolist() == [token for number in order for token in (50256, number)]
    assert fineweb.open_shards(str(folder), "val", 50257).read(0, 2).tolist() == [50256, 0]
    assert fineweb.missing_shards(train.paths) == ""
    table, _ = run_fineweb("--check", "--data_dir", folder)
    assert table.splitlines()[1].startswith(names[0])
    assert table.splitlines()[-1] == f"{len(names)} shards, {2 * len(names)} tokens, 0 bad"


@pytest.mark.parametrize("name", ["trainval_000001.bin", "x_train_val_000001.bin", "val_of_train.bin"])
def test_a_name_with_both_splits_is_refused(tmp_path, name):
    for i, other in enumerate(["x_val_000000.bin", "x_train_000001.bin", name]):
        fineweb.write_shard(str(tmp_path / other), [50256, i])
    for split in "train", "val":
        with pytest.raises(SystemExit) as e:
            fineweb.open_shards(str(tmp_path), split, 50257)
        assert e.value.code == (f"error: {tmp_path / name}: its name holds both train and val; rename it, or move it "
                                "away")
    table, _ = run_fineweb("--check", "--data_dir", tmp_path, code=1)
    assert "BAD: its name must hold train or val, and not both" in table


@pytest.mark.parametrize("names, train_gaps, says", [
    (["x_val_0.bin", "x_train_0.bin", "x_train_2.bin"], "1", "1 of train"),
    (["x_val_0.bin", "x_train_2.bin", "x_train_5.bin"], "1, 3, 4", "1, 3, 4 of train"),
    (["x_val_1.bin", "x_train_1.bin", "x_train_2.bin"], "", ""),
    (["x_val_0.bin", "x_val_2.bin", "x_train_0.bin", "y_train_2.bin"], "1", "1 of val; 1 of train"),
    (["x_train_1.bin", "x_train_3.bin"], "2", "0 of val; 2 of train"),
    (["x_val_0.bin"], None, "1 of train"),
    (["x_val_0.bin", "x_train_20240131.bin"], ", ".join(map(str, range(1, 21))) + ", ...", "20, ... of train"),
])
def test_missing_shards(tmp_path, names, train_gaps, says):
    for name in names:
        fineweb.write_shard(str(tmp_path / name), [50256, 1])
    if train_gaps is not None:
        paths = fineweb.open_shards(str(tmp_path), "train", 50257).paths
        assert fineweb.missing_shards(paths) == train_gaps
    table, _ = run_fineweb("--check", "--data_dir", tmp_path, code=1 if says else 0)
    *_, last = table.splitlines()
    assert last.endswith(says or "0 bad")
    assert ("MISSING" in last) == bool(says)


@pytest.mark.parametrize("processes", [1, 2])
def test_training_warns_of_a_gap(tmp_path, processes):
    """A gap in the train shards is one line, however many processes read them."""
    shards("data")
    os.unlink("data/x_train_000002.bin")
    options = ["--data_dir=data", *QUICK, "--max_steps=2"]
    result = shell("train_gpt2.py", *options, processes=0 if processes == 1 else processes)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("data lacks train shard 2:") == 1


# ---- bad input -------------------------------------------------------------------------------------------------------

CUT_GZIP = gzip.compress(bytes(range(97, 120)) * 99)[:-9]
CUT_ZST = zst(random.Random(0).randbytes(10**5).hex().encode())[:-9]
CUT_XZ = lzma.compress(b"hello" * 99)[:-9]
WITHOUT_TEXT = b'{"text": "a"}\n{"id": 1, "body": "b"}\n'
FRESH = {"options": {}, "shard": 0, "document": 0, "token": 0, "tokens": 0, "counts": [], "finished": False}
BROKEN_PROGRESS = [[], 3, None, "text", {}, FRESH | {"options": []}, FRESH | {"shard": "1"}, FRESH | {"shard": -1},
                   FRESH | {"document": 1.5}, FRESH | {"token": None}, FRESH | {"tokens": True}, FRESH | {"counts": 3},
                   FRESH | {"counts": ["a"]}, FRESH | {"finished": 1}, FRESH | {"vocab": None}]
BAD = {  # case: files to make, options, what the one line must say
    "no match": ({}, "--files none*.txt", "none*.txt"),
    "an empty folder": (
        {"books/.hidden/a.txt": b"x", "books/a.pdf": b"x"}, "--files books", "--files books: no file of a known"),
    "unknown kind": ({"a.doc": b"x"}, "--files a.doc", "a.doc"),
    "not gzip": ({"a.jsonl.gz": b"hello"}, "--files a.jsonl.gz", "error: a.jsonl.gz: cannot be read"),
    "cut gzip": ({"a.txt.gz": CUT_GZIP}, "--files a.txt.gz", "a.txt.gz"),
    "cut xz": ({"a.txt.xz": CUT_XZ}, "--files a.txt.xz", "a.txt.xz"),
    "cut zst": ({"a.txt.zst": CUT_ZST}, "--files a.txt.zst", "error: a.txt.zst: cannot be read"),
    "not zst": ({"a.txt.zst": b"hello"}, "--files a.txt.zst", "a.txt.zst"),
    "not parquet": ({"a.parquet": b"hello"}, "--files a.parquet", "a.parquet"),
    "not utf-8": ({"a.txt": b"caf\xe9"}, "--files a.txt", "a.txt"),
    "bad json": ({"a.jsonl": b'{"text": "a"}\n\n{"text": \n'}, "--files a.jsonl", "a.jsonl line 3"),
    "bad array": ({"a.json": b'[{"text": "a"},'}, "--files a.json", "a.json"),
    "no field": ({"a.jsonl": WITHOUT_TEXT}, "--files a.jsonl", "line 2: no text column among: id, body"),
    "not an object": ({"a.jsonl": b'"a"\n'}, "--files a.jsonl", "a.jsonl line 1"),
    "not a string": ({"a.jsonl": b'{"text": 5}\n'}, "--files a.jsonl", "a.jsonl line 1"),
    "no column": ({"a.parquet": lambda: parquet(["x"], "body")}, "--files a.parquet", "no text column among: id, body"),
    "two fields": (
        {"a.jsonl": b'{"Text": "a", "TEXT": "b"}\n'}, "--files a.jsonl", "line 1: 2 text columns: Text, TEXT"),
    "two columns": (
        {"a.parquet": lambda: parquet(["a"], "Text", TEXT=["b"])}, "--files a.parquet", "2 text columns: Text, TEXT"),
    "not text": ({"a.parquet": lambda: parquet([1, 2])}, "--files a.parquet", "holds int64"),
    "bytes": ({"a.parquet": lambda: parquet([b"a"])}, "--files a.parquet", "holds binary"),
    "list of strings": ({"a.parquet": lambda: parquet([["a", "b"]] * 20)}, "--files a.parquet", "holds list<"),
    "struct of strings": (
        {"a.parquet": lambda: parquet([{"content": "a"}], kind="struct")}, "--files a.parquet", "holds struct<content"),
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
    "foreign shards": (
        {"a.txt": b"a b c", "out/fineweb_val_000000.bin": b""}, "--files a.txt --val_tokens 2", "progress.json"),
    "broken progress": (
        {"a.txt": b"a b c", "out/progress.json": b"{"}, "--files a.txt --val_tokens 2", "progress.json"),
    **{f"broken progress {i}": (
        {"a.txt": b"a b c", "out/progress.json": json.dumps(progress).encode()}, "--files a.txt --val_tokens 2",
        "progress.json is damaged") for i, progress in enumerate(BROKEN_PROGRESS)},
    "nested progress": (
        {"a.txt": b"a b c", "out/progress.json": b"[" * 10**5}, "--files a.txt --val_tokens 2",
        "progress.json is damaged"),
    "no network": ({}, "--dataset no/such", "--dataset no/such"),
    "no network 2": ({}, "--pretokenized", "kjj0/fineweb10B-gpt2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(gpt2_bpe, tmp_path, case, monkeypatch, capsys):
    """Run in this process, which is quick, unless the case needs other settings of the hub's client."""
    files, options, says = BAD[case]
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data() if callable(data) else data)
    arguments = ["--data_dir", "out", "--num_proc", "1", *options.split()]
    if case.startswith("no network"):
        env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
        _, errors = run_fineweb(*arguments, code=1, env=env, cwd=tmp_path)
        assert_one_line(errors, says)
    else:
        monkeypatch.setattr(sys, "argv", ["fineweb.py", *arguments])
        bad(capsys, fineweb.main, "error: ", says)
        assert [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line and not BARS.search(line)] == []
    if case != "foreign shards":
        assert not list(tmp_path.glob("out/*.bin"))
        assert not list(tmp_path.glob("out/*.tmp"))
    assert (tmp_path / "out").exists() == any(name.startswith("out") for name in files)  # a failed try leaves no folder


def test_other_options_are_refused_and_harmless(gpt2_bpe, tmp_path):
    (tmp_path / "a.txt").write_text("a b c d e f g")
    (tmp_path / "b.txt").write_text("a b c d e f g h")

    def args(file="a.txt", val=2, size=3):
        return ["--files", file, "--val_tokens", val, "--shard_size", size, "--data_dir", "out"]

    _, errors = run_fineweb(*args(val=99), code=1, cwd=tmp_path)
    assert "only 8 tokens" in errors[0]
    run_fineweb(*args(), cwd=tmp_path)  # nothing was finished before, so other options are welcome
    before = shard_bytes(tmp_path / "out")
    others = [
        (args(size=4), "--shard_size 3"),
        (args(val=3), "--val_tokens 2"),
        (args("b.txt"), "--files"),
        (args() + ["--max_tokens", 5], "--max_tokens None"),
    ]
    for other, says in others:
        _, errors = run_fineweb(*other, code=1, cwd=tmp_path)
        assert_one_line(errors, says)
        assert shard_bytes(tmp_path / "out") == before


def test_disk_full(gpt2_bpe, tmp_path):
    """A file-size limit stands in for a full disk: finished shards stay, the unfinished one goes, the rest follows."""
    docs = some_documents()
    out = tmp_path / "out"
    (tmp_path / "a.jsonl").write_bytes(jsonl(docs))
    args = ["--files", tmp_path / "a.jsonl", "--val_tokens", 1000, "--shard_size", 10000, "--data_dir", out]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

    _, errors = run_fineweb(*args, code=1, preexec_fn=limit)
    assert_one_line(errors, "File too large")
    assert [path.name for path in sorted(out.iterdir())] == [".lock", "fineweb_val_000000.bin", "progress.json"]
    run_fineweb(*args)
    assert shard_bytes(out) == expected_shards(gpt2_bpe, docs, 1000, 10000)


def test_long_messages_are_cut_at_a_word(capsys):
    with pytest.raises(SystemExit) as e:
        fineweb.fail("a word " * 100)
    assert e.value.code == "error: " + "a word " * 71 + "a ..."
    assert fineweb.describe(OSError("x" * 400)) == "OSError: " + "x" * 300 + " ..."
    assert fineweb.describe(OSError("short\n enough")) == "OSError: short enough"


# ---- one writer per folder -------------------------------------------------------------------------------------------

def test_one_writer(gpt2_bpe, tmp_path):
    """A second writer is refused at once; a killed one leaves nothing in the way, and its temporary files go."""
    docs = some_documents(4000)
    (tmp_path / "a.jsonl").write_bytes(jsonl(docs))
    out = tmp_path / "out"
    args = ["--files", tmp_path / "a.jsonl", "--val_tokens", 1000, "--shard_size", 100000, "--num_proc", 1,
            "--data_dir", out]
    first = subprocess.Popen([*FINEWEB, *map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "fineweb_train_000001.bin").exists():
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    try:
        for _ in "second", "third":
            begin = time.time()
            _, errors = run_fineweb(*args, code=1)
            assert time.time() - begin < 20
            assert_one_line(errors, f"another process writes to {out}: PID {first.pid} on {socket.gethostname()}; "
                                    "wait for it, or use another --data_dir")
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        run_fineweb("--check", "--data_dir", out)  # reading needs no lock
    finally:
        first.kill()
        first.wait()
    stale = out / "fineweb_train_000002.bin.0123abcd.tmp"
    stale.write_bytes(b"x")
    (out / "notes.tmp").write_bytes(b"x")
    run_fineweb(*args)
    assert shard_bytes(out) == expected_shards(gpt2_bpe, docs, 1000, 100000)
    assert [path.name for path in out.glob("*.tmp")] == ["notes.tmp"]


def test_lock_is_released(tmp_path):
    folder = str(tmp_path / "a" / "b")
    for _ in "first", "again":
        with fineweb.lock_folder(folder, "--log_dir"), pytest.raises(SystemExit) as e:
            fineweb.lock_folder(folder, "--log_dir")
        assert e.value.code.endswith(f"PID {os.getpid()} on {socket.gethostname()}; wait for it, or use another "
                                     "--log_dir")


@pytest.mark.parametrize("code, refused", [(errno.EACCES, True), (errno.ENOSYS, False), (errno.EOPNOTSUPP, False),
                                           (errno.ENOLCK, False)])
def test_lock_where_the_file_system_is_unusual(tmp_path, monkeypatch, capsys, code, refused):
    """Some file systems say "no permission" for "locked", others have no locks: then work goes on, after a warning."""
    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    stale = tmp_path / "model_00001.pt.0123abcd.tmp"
    stale.write_bytes(b"x")
    if refused:
        with pytest.raises(SystemExit):
            fineweb.lock_folder(str(tmp_path), "--log_dir")
    else:
        fineweb.lock_folder(str(tmp_path), "--log_dir").close()
        assert capsys.readouterr().err.count("take care that no other process writes to it\n") == 1
    assert stale.exists()  # it may belong to a living process


def test_two_writers_of_one_file(tmp_path):
    """Each of two writers at once, such as two --tiny runs, leaves a whole file with the usual rights."""
    path = tmp_path / "x.bin"
    with fineweb.replacing(str(path)) as first:
        first.write(b"first")
        with fineweb.replacing(str(path)) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
        first.write(b" whole")
    assert path.read_bytes() == b"first whole"
    assert os.listdir(tmp_path) == ["x.bin"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


# ---- the hub: a stand-in for huggingface.co on the loopback ----------------------------------------------------------

class Hub(Answer):
    """Answers the requests of huggingface_hub and datasets for the repositories in `repos`."""

    repos = {}  # "owner/name" -> {path: bytes}
    log = []  # paths whose contents were requested
    protocol_version = "HTTP/1.1"

    def answer(self, body=b"", code=200, **headers):
        self.send_response(code)
        headers = {"Content_Length": len(body), "X_Repo_Commit": "c" * 40, **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, reply):
        self.answer(json.dumps(reply).encode(), Content_Type="application/json")

    def do_GET(self):
        path, _, _ = self.path.partition("?")
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        pattern = r"(?:/api)?/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info|resolve)/[^/]+)?(?:/(.+))?$"
        match = re.match(pattern, urllib.parse.unquote(path))
        if not match or match[1] not in self.repos:
            return self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
        repo, kind, path = match.groups()
        files = self.repos[repo]
        entries = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()]
        if kind == "resolve":
            self.send_file(files, path)
        elif kind == "tree":
            self.answer_json([entry for entry in entries if not path or entry["path"].startswith(path + "/")])
        elif kind == "paths-info":
            wanted = json.loads(sent)["paths"] if sent.startswith("{") else urllib.parse.parse_qs(sent)["paths"]
            self.answer_json([entry for entry in entries if entry["path"] in wanted])
        else:
            self.answer_json({
                "_id": "0" * 24, "id": repo, "sha": "c" * 40, "private": False, "disabled": False, "gated": False,
                "downloads": 0, "likes": 0, "tags": [], "siblings": [{"rfilename": name} for name in files]})

    do_HEAD = do_POST = do_GET

    def send_file(self, files, path):
        """Send a file or the range of it that the request asks for."""
        if path not in files:
            return self.answer(b"", 404, X_Error_Code="EntryNotFound")
        if self.command == "GET":
            self.log.append(path)
        data = files[path]
        headers = {"ETag": f'"{hash(data):x}"', "Accept_Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if not wanted:
            return self.answer(data, **headers)
        first, last = re.match(r"bytes=(\d+)-(\d*)", wanted).groups()
        begin = int(first)
        part = data[begin:int(last) + 1 if last else None]
        content_range = f"bytes {begin}-{begin + len(part) - 1}/{len(data)}"
        self.answer(part, 206, Content_Range=content_range, **headers)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve an empty Hub; returns the environment in which the libraries use it."""
    monkeypatch.setattr(Hub, "repos", {})
    monkeypatch.setattr(Hub, "log", [])
    with serve(Hub) as url:
        yield {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


def test_hub(gpt2_bpe, tmp_path, hub):
    docs = [doc.replace("\ud800", "") for doc in some_documents(300)]
    Hub.repos["some/set"] = {
        "train-00000.parquet": parquet(docs[:200], "TEXT"),
        "train-00001.parquet": parquet(docs[200:], "TEXT"),
    }
    Hub.repos["some/images"] = {"train-00000.parquet": parquet(docs[:20], "caption")}
    Hub.repos["some/lists"] = {"train-00000.parquet": parquet([[doc] for doc in docs[:20]])}
    Hub.repos["some/pair"] = {"train-00000.parquet": parquet(docs[:20], "Text", TEXT=docs[:20])}
    expected = expected_shards(gpt2_bpe, docs, 1000, 5000)
    ends = np.cumsum([len(document_tokens(gpt2_bpe, doc)) for doc in docs])
    *_, total = ends.tolist()
    more = {"whole": [], "streamed": ["--max_tokens", total + 1]}  # with a maximum the data set is streamed

    def assert_complete(name):
        out = tmp_path / name
        args = ["--dataset", "some/set", "--val_tokens", 1000, "--shard_size", 5000, *more[name], "--data_dir", out]
        run_fineweb(*args, env=hub)
        assert shard_bytes(out) == expected, name

    for name in more:
        assert_complete(name)
    # resumed before the third shard
    begins = [0, *ends.tolist()]
    document = int(np.searchsorted(begins, 6000, side="right")) - 1
    place = {"shard": 2, "document": document, "token": 6000 - begins[document], "tokens": 6000, "finished": False}
    for name in more:
        for shard in list(expected)[2:]:
            (tmp_path / name / shard).unlink()
        path = tmp_path / name / "progress.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | place))
        assert_complete(name)
    wrong = [
        (["--dataset", "some/images"], "no text column among: id, caption"),
        (["--dataset", "some/lists", "--val_tokens", 5], "holds list<"),
        (["--dataset", "some/lists", "--val_tokens", 5, "--max_tokens", 9], "holds list<"),
        (["--dataset", "some/pair"], "2 text columns: Text, TEXT"),
        (["--dataset", "some/set", "--split", "test"], "--split"),
    ]
    for options, says in wrong:
        _, errors = run_fineweb(*options, "--data_dir", tmp_path / "bad", env=hub, code=1)
        assert_one_line(errors, says)


def test_pretokenized(tmp_path, hub):
    def shard(n, token):
        path = tmp_path / "shard"
        fineweb.write_shard(str(path), [50256] + [token] * (n - 1))
        return path.read_bytes()

    there = {
        "README.md": b"x",
        "fineweb_val_000000.bin": shard(100, 0),
        "fineweb_train_000002.bin": shard(100, 2),
        "fineweb_train_000001.bin": shard(100, 1),
        "fineweb_train_000003.bin": shard(100, 3),
    }
    Hub.repos["kjj0/fineweb10B-gpt2"] = there
    Hub.repos["kjj0/finewebedu10B-gpt2"] = {
        "finewebedu_val_000000.bin": shard(90, 0),
        "finewebedu_train_000001.bin": shard(90, 1),
    }
    out = tmp_path / "out"
    run_fineweb("--pretokenized", "--max_tokens", 250, "--data_dir", out, env=hub)
    assert list(shard_bytes(out)) == ["fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin"]
    # a second run fetches only what is not whole
    (out / "fineweb_train_000002.bin").write_bytes(b"half")
    Hub.log.clear()
    run_fineweb("--pretokenized", "--data_dir", out, env=hub)
    assert shard_bytes(out) == {name: data for name, data in sorted(there.items()) if name.endswith(".bin")}
    assert sorted(Hub.log) == ["fineweb_train_000002.bin", "fineweb_train_000003.bin"]
    run_fineweb("--check", "--data_dir", out)
    # another data set
    edu = tmp_path / "edu"
    run_fineweb("--pretokenized", "--dataset", "kjj0/finewebedu10B-gpt2", "--data_dir", edu, env=hub)
    assert list(shard_bytes(edu)) == ["fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    # each split keeps its own numbers
    golf = {name: shard(80 + i, i) for i, name in enumerate(
        ["x_train_000000.bin", "x_train_000001.bin", "x_val_000000.bin", "x_val_000001.bin", "tokenizer.bin"])}
    tiny = {"tiny_shakespeare_train.bin": shard(70, 1), "TinyStories_val.bin": shard(70, 2)}
    Hub.repos |= {"some/golf": golf, "some/tiny": tiny}
    for repo, most, local in [
        ("some/golf", None, {f"fineweb_{name}": golf[f"x_{name}"] for name in (
            "train_000000.bin", "train_000001.bin", "val_000000.bin", "val_000001.bin")}),
        ("some/golf", 1, {f"fineweb_{name}": golf[f"x_{name}"] for name in ("train_000000.bin", "val_000000.bin")}),
        ("some/tiny", None, {"fineweb_train_000001.bin": tiny["tiny_shakespeare_train.bin"],
                             "fineweb_val_000000.bin": tiny["TinyStories_val.bin"]}),
    ]:
        out = tmp_path / f"{repo} {most}"
        for _ in "first", "again":
            Hub.log.clear()
            options = ["--max_tokens", most] if most else []
            run_fineweb("--pretokenized", "--dataset", repo, *options, "--data_dir", out, env=hub)
            assert shard_bytes(out) == local
        assert not Hub.log
        run_fineweb("--check", "--data_dir", out)
    for names, says in [
        (["a_train_1.bin", "b_train_000001.bin"], "a_train_1.bin and b_train_000001.bin would both become"),
        (["a_train.bin", "a_train_000001.bin"], "would both become fineweb_train_000001.bin"),
        (["a_trainval_1.bin"], "both train and val"),
    ]:
        Hub.repos["some/pair"] = {name: shard(70, 1) for name in names}
        _, errors = run_fineweb("--pretokenized", "--dataset", "some/pair", "--data_dir", tmp_path / "bad", env=hub,
                                code=1)
        assert_one_line(errors, says)
    # a vocabulary comes along, and is not mixed with another
    letters = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)).encode()
    Hub.repos["some/bytes"] = {"vocab.tiktoken": letters, "x_train_1.bin": shard(70, 1), "x_val_0.bin": shard(70, 2)}
    for _ in "first", "again":
        run_fineweb("--pretokenized", "--dataset", "some/bytes", "--data_dir", tmp_path / "bytes", env=hub)
        assert (tmp_path / "bytes/vocab.tiktoken").read_bytes() == letters
        assert fineweb.n_tokens(fineweb.vocab_of(tmp_path / "bytes")) == 257
    for repo, folder in ("some/bytes", edu), ("some/tiny", tmp_path / "bytes"):
        _, errors = run_fineweb("--pretokenized", "--dataset", repo, "--data_dir", folder, env=hub, code=1)
        assert_one_line(errors, f"holds tokens of another vocabulary than {repo}")
    Hub.repos["some/empty"] = {"README.md": b"x"}
    for repo in "some/empty", "no/such":
        _, errors = run_fineweb("--pretokenized", "--dataset", repo, "--data_dir", tmp_path / "bad", env=hub, code=1)
        assert len(errors) == 1
        assert repo in errors[0]
