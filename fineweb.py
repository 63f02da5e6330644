"""
Text to shards of GPT-2 tokens: run once, before training.   pip install numpy tiktoken datasets tqdm

    python fineweb.py                                         # FineWeb sample-10BT to fineweb10B/: 10.3B tokens, 21 GB
    python fineweb.py --pretokenized --max_tokens 1000000000  # the same data as tokenized and published by others
    python fineweb.py --max_tokens 300000000                  # a sample: streamed, so only what it needs is fetched
    python fineweb.py --dataset HuggingFaceFW/fineweb-edu --name sample-10BT --data_dir edu10B
    python fineweb.py --dataset manu/project_gutenberg --split en --data_dir gutenberg
    python fineweb.py --files 'books/*.txt' wiki.jsonl.xz --val_tokens 1000000 --data_dir mine
    python fineweb.py --check                                 # are the shards whole and sane?

Killed at any moment and started again with the same options, it goes on after the last finished shard; the bytes are
those of an uninterrupted run, whatever the number of processes.

A shard has llm.c's format: 256 int32 (20240520, 1, number of tokens, zeros), then uint16 tokens. The documents form one
stream, each with <|endoftext|> (50256) in front, blank ones left out. Its first val_tokens tokens are
fineweb_val_000000.bin; the rest is cut every shard_size tokens, inside documents too: fineweb_train_000001.bin, ...
"""
import argparse
import glob
import gzip
import io
import json
import lzma
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress

import numpy as np  # other packages are imported where used: each worker imports this file again

EOT, MAGIC, VERSION, HEADER = 50256, 20240520, 1, 256  # HEADER in int32, i.e. 1024 bytes


def fail(message):
    """Ends the program: one line on stderr, exit code 1."""
    sys.exit("fineweb.py: " + " ".join(message.split()))


def why(error):
    return f"{type(error).__name__}: {str(error)[:300]}"

# ---------------------------------------------------------------------------------------------------------------------
# shards


@contextmanager
def replacing(path):
    """A binary file that takes its name only once it is whole and on the disk; after an error nothing is left of it."""
    try:
        with open(path + ".tmp", "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except BaseException:
        with suppress(OSError):
            os.unlink(path + ".tmp")
        raise


def write_shard(path, tokens):
    """Writes a shard, all of it or nothing, and returns its number of tokens.
    tokens: a sequence of ids below 65536, or a generator of such sequences, of which one at a time is in memory."""
    count = 0
    with replacing(path) as f:
        f.write(bytes(HEADER * 4))
        for part in [tokens] if hasattr(tokens, "__len__") else tokens:
            f.write(np.asarray(part, dtype=np.uint16).tobytes())
            count += len(part)
        f.seek(0)  # only now is the count known
        f.write(np.array([MAGIC, VERSION, count], dtype=np.int32).tobytes())
    return count


def open_shard(path):
    """The shard's tokens, uint16, memory-mapped. ValueError says what is wrong with it, OSError if it is unreadable."""
    header = np.fromfile(path, dtype=np.int32, count=HEADER)
    if len(header) < HEADER or header[0] != MAGIC or header[1] != VERSION:
        raise ValueError(f"not a GPT-2 token shard (it does not start with {MAGIC}, {VERSION})")
    count, size = int(header[2]), os.path.getsize(path)
    if count < 1 or size != HEADER * 4 + 2 * count:
        raise ValueError(f"damaged: its header says {count} tokens, its size {(size - HEADER * 4) / 2:g}")
    return np.memmap(path, dtype=np.uint16, mode="r", offset=HEADER * 4, shape=(count,))


def shard_path(data_dir, index):
    return os.path.join(data_dir, f"fineweb_{'train' if index else 'val'}_{index:06d}.bin")


def check(data_dir):
    """Prints a table of the shards; returns the exit code, 1 if one is bad or missing."""
    paths = sorted(glob.glob(os.path.join(glob.escape(data_dir), "*.bin")), key=lambda p: ("_val_" not in p, p))
    if not paths:
        fail(f"no shards (*.bin) in {data_dir}: name their folder with --data_dir")
    have = {int(n) for path in paths for n in re.findall(r"_(\d+)\.bin$", path)}
    gaps = sorted(set(range(max(have, default=0))) - have)
    print(f"{'shard':<28}{'tokens':>13}{'documents':>11}{'largest id':>12}  {'starts with':<17}verdict")
    bad = total = 0
    for path in paths:
        count, documents, largest, starts, verdict = 0, 0, 0, "", "ok"
        try:
            tokens = open_shard(path)
            count, starts = len(tokens), "a document" if tokens[0] == EOT else "a remainder"
            for i in range(0, count, 1 << 24):  # 32 MB at a time
                documents += int((tokens[i:i + (1 << 24)] == EOT).sum())
                largest = max(largest, int(tokens[i:i + (1 << 24)].max()))
            if largest > EOT:
                verdict = f"BAD: GPT-2's ids end at {EOT}"
            elif "_val_" in path and tokens[0] != EOT:  # train shards begin where the one before was cut
                verdict = f"BAD: its first token is not {EOT}"
        except (OSError, ValueError) as e:
            verdict = f"BAD: {e}"
        bad, total = bad + (verdict != "ok"), total + count
        print(f"{os.path.basename(path):<28}{count:>13,}{documents:>11,}{largest:>12}  {starts:<17}{verdict}")
    print(f"{len(paths)} shards, {total:,} tokens, {bad} bad" + f", MISSING: {str(gaps)[1:-1]}" * bool(gaps))
    return 1 if bad or gaps else 0

# ---------------------------------------------------------------------------------------------------------------------
# sources of text: .id tells them apart, .read(start) yields the documents (str, or None for a hole in a table) from
# number start on, .fraction says how much of the whole has been read (None: unknown)


def text_column(names, where):
    """The text column's name: text in FineWeb, TEXT or Text in other places."""
    for name in names:
        if name.lower() == "text":
            return name
    fail(f"{where}: no text column among: {', '.join(names)}")


def column_texts(tables, where):
    for table in tables:
        if not re.search("string|null", str(table.schema.types[0])):
            fail(f"{where}: the column {table.schema.names[0]} holds {table.schema.types[0]}, not text")
        yield from table.column(0).to_pylist()


def json_texts(stream, path):
    """One object a line, or an array of objects (which is read whole)."""
    array = stream.peek(1).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
    for n, row in enumerate(json.load(stream) if array else stream, 1):
        where = f"{path} {'element' if array else 'line'} {n}"
        if not array:
            if row.isspace():
                continue
            try:
                row = json.loads(row)
            except ValueError as e:
                fail(f"{where}: not JSON ({e}); repair or drop it")
        if not isinstance(row, dict):
            fail(f'{where}: not an object like {{"text": "..."}}; repair or drop it')
        text = row["text"] if "text" in row else row[text_column(row, where)]
        if not isinstance(text, (str, type(None))):
            fail(f"{where}: its text is of type {type(text).__name__}, not a string; repair or drop it")
        yield text


def txt_texts(stream):
    """One document, or several with <|endoftext|> (which never straddles lines) between them."""
    parts, lines = [], io.TextIOWrapper(stream, encoding="utf-8", newline="")
    for line in lines:
        head, *others = line.split("<|endoftext|>")
        parts.append(head)
        for other in others:
            yield "".join(parts)
            parts = [other]
    yield "".join(parts)


class Files:
    kinds = re.compile(r"\.(?:(parquet)|(jsonl|json|txt)(?:\.(gz|xz|zst))?)$", re.IGNORECASE)

    def __init__(self, patterns):
        self.sizes = {}  # path -> bytes; keeps the order, and a file that two patterns match counts once
        for pattern in patterns:
            found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
            self.sizes |= {path: os.path.getsize(path) for path in found if os.path.isfile(path)}
            if not any(map(os.path.isfile, found)):
                fail(f"--files {pattern}: no such file")
        for path in self.sizes:
            if not self.kinds.search(path):
                fail(f"--files {path}: neither parquet nor jsonl, json or txt (plain, .gz, .xz or .zst)")
        self.id = {"files": [[os.path.basename(path), size] for path, size in self.sizes.items()]}
        self.counts, self.fraction = [], None  # counts: documents of the files read to the end, skipped when resuming

    def read(self, start):
        passed = 0
        for i, (path, size) in enumerate(self.sizes.items()):
            if i >= len(self.counts) or start < self.counts[i]:
                n = 0
                try:
                    with open(path, "rb") as raw:
                        for n, text in enumerate(self.texts(raw, path), 1):
                            if n > start:
                                self.fraction = (passed + raw.tell()) / sum(self.sizes.values())
                                yield text
                except Exception as e:  # every format and codec has errors of its own
                    fail(f"{path}: cannot be read ({why(e)}); repair it or leave it out")
                self.counts[i:i + 1] = [n]
            start, passed = max(0, start - self.counts[i]), passed + size

    def texts(self, raw, path):
        parquet, kind, codec = (group and group.lower() for group in self.kinds.search(path).groups())
        if parquet:
            import pyarrow.parquet
            file = pyarrow.parquet.ParquetFile(raw, buffer_size=1 << 20)  # a column chunk may be larger than the memory
            return column_texts(file.iter_batches(64, columns=[text_column(file.schema_arrow.names, path)]), path)
        if codec == "zst":
            import pyarrow
            raw = io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
        elif codec:
            raw = gzip.open(raw) if codec == "gz" else lzma.open(raw)
        return txt_texts(raw) if kind == "txt" else json_texts(raw, path)


class Hub:
    """A dataset of the Hugging Face hub: fetched whole first, or streamed."""
    def __init__(self, dataset, name, split, streaming, num_proc):
        from datasets import load_dataset
        self.id = {"dataset": dataset, "name": name, "split": split}
        self.where, self.counts, self.fraction = f"--dataset {dataset}", [], None
        fetchers = None if streaming or num_proc == 1 else min(num_proc, 16)  # 16: the hub limits requests
        try:
            data = load_dataset(dataset, name=name, split=split, streaming=streaming, num_proc=fetchers)
            names = data.column_names or list(next(iter(data)))  # streams need not declare their columns
        except Exception as e:  # no network, no such dataset, name or split: many types
            fail(f"{self.where}: cannot be loaded ({why(e)}); check the network, --dataset, --name, --split")
        splits = data.info.splits or {}  # a stream's length is what its card says, if it does
        self.total = len(data) if not streaming else splits[split].num_examples if split in splits else None
        self.data = data.select_columns([text_column(names, self.where)]).with_format("arrow")

    def read(self, start):
        try:
            for n, text in enumerate(column_texts(self.data.skip(start).iter(64), self.where), start + 1):
                self.fraction = n / self.total if self.total else None
                yield text
        except Exception as e:
            fail(f"{self.where}: reading stopped ({why(e)}); start again to go on after the last finished shard")

# ---------------------------------------------------------------------------------------------------------------------
# tokens: workers turn lists of documents into arrays, the parent keeps the order


def start_worker():
    """Runs in each worker. A parent killed with -9 cannot stop its workers, so they watch it."""
    import tiktoken
    global enc
    enc = tiktoken.get_encoding("gpt2")
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def tokenize(texts):
    """-> the tokens of all documents (uint16), and how many are of each (a list, 0 for a blank document)."""
    parts, lengths = [np.zeros(0, np.uint16)], []
    for text in texts:
        if not text or text.isspace():
            lengths.append(0)
            continue
        try:  # gives what encode_ordinary gives, in 5/6 of the time and a tenth of the memory
            ids = enc.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate, "\ud800" in JSON; encode_ordinary puts U+FFFD there
            ids = enc.encode_ordinary(text)
        parts += [[EOT], ids]
        lengths.append(1 + len(ids))
    return np.concatenate(parts, dtype=np.uint16, casting="unsafe"), lengths


def batches(texts):
    """Lists of documents: large, as each costs a round trip to a worker; not too large, as many are in flight."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text or "")
        if len(batch) == 256 or size >= 1_000_000:
            yield batch
            batch, size = [], 0
    yield batch


def tokenized(source, start, num_proc):
    """Yields what tokenize returns, in order, and the fraction of the source read by then."""
    pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), initializer=start_worker)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the workers: Ctrl-C is for the parent
    for _ in range(num_proc):
        pool.submit(int)  # starts a worker, as long as none is idle
    signal.signal(signal.SIGINT, handler)
    pending = deque()
    try:
        for batch in batches(source.read(start)):
            pending.append((pool.submit(tokenize, batch), source.fraction))
            if len(pending) > 3 * num_proc:  # bounds the memory, whoever is slower
                future, fraction = pending.popleft()
                yield *future.result(), fraction
        for future, fraction in pending:
            yield *future.result(), fraction
    except BrokenProcessPool:
        fail("a worker died, for want of memory perhaps: start again with a smaller --num_proc, it goes on")
    finally:
        pool.shutdown(cancel_futures=True)


class Stream:
    """The one token stream, from token `skip` of document `start` on; `start` becomes the answer's first document."""
    def __init__(self, answers, start, skip):
        self.answers, self.start, self.i = answers, start, skip
        self.tokens, self.lengths, self.fraction = [], [], None

    def more(self):
        """Waits for the next token; False at the end of the stream."""
        while self.i >= len(self.tokens):
            answer = next(self.answers, None)
            if answer is None:
                return False
            self.i, self.start = self.i - len(self.tokens), self.start + len(self.lengths)
            self.tokens, self.lengths, self.fraction = answer
        return True

    def take(self, n):
        """Yields the next n tokens, fewer at the end of the stream, in pieces."""
        while n and self.more():
            piece = self.tokens[self.i:self.i + n]
            self.i, n = self.i + len(piece), n - len(piece)
            yield piece

    def place(self):
        """-> the next token's document, and which token of it that is."""
        ends = np.cumsum(self.lengths)
        d = int(np.searchsorted(ends, self.i, side="right"))
        return self.start + d, self.i - int(ends[d]) + self.lengths[d]

# ---------------------------------------------------------------------------------------------------------------------


def save_progress(data_dir, progress):
    with replacing(os.path.join(data_dir, "progress.json")) as f:
        f.write(json.dumps(progress).encode())


def load_progress(data_dir, options):
    """What is done in the folder and where the next shard starts. Shards of other options are never written over."""
    path = os.path.join(data_dir, "progress.json")
    fresh = {"options": options, "shard": 0, "document": 0, "token": 0, "tokens": 0, "counts": [], "finished": False}
    if not os.path.exists(path):
        if glob.glob(os.path.join(glob.escape(data_dir), "*.bin")):
            fail(f"{data_dir} has shards but no progress.json to go on from: use another --data_dir, or delete them")
        return fresh
    try:
        with open(path) as f:
            progress = json.load(f)
        old, shards = progress["options"], progress["shard"]
    except (ValueError, KeyError, TypeError):
        fail(f"{path} is damaged: use another --data_dir, or delete it and the shards beside it")
    if old != options:
        if shards == 0:
            return fresh
        was = " ".join(f"--{k} {str(v)[:60]}" for k, v in old.items() if v != options.get(k))
        fail(f"{data_dir} was begun with {was}: give the same options to go on, or another --data_dir")
    for i in range(shards):
        try:
            open_shard(shard_path(data_dir, i))
        except (OSError, ValueError) as e:
            fail(f"{shard_path(data_dir, i)}: {why(e)}; put it back, or delete {path} and the shards to start afresh")
    return progress


def build(data_dir, source, shard_size, val_tokens, max_tokens, num_proc):
    """Makes the shards, or goes on making them."""
    import tiktoken
    from tqdm import tqdm
    options = {**source.id, "shard_size": shard_size, "val_tokens": val_tokens, "max_tokens": max_tokens}
    progress = load_progress(data_dir, options)
    shard, done, source.counts = progress["shard"], progress["tokens"], progress["counts"]
    if progress["finished"]:
        return print(f"{data_dir}: finished before, {done:,} tokens in {shard} shards; nothing to do")
    try:
        tiktoken.get_encoding("gpt2")  # the workers find it in tiktoken's cache then
    except Exception as e:
        fail(f"GPT-2's vocabulary cannot be had ({why(e)}): connect once, or point TIKTOKEN_CACHE_DIR at a copy")
    save_progress(data_dir, progress)
    most = max_tokens or sys.maxsize
    answers = tokenized(source, progress["document"], num_proc)
    stream = Stream(answers, progress["document"], progress["token"])
    with closing(answers), tqdm(initial=done, total=max_tokens, unit="tok", unit_scale=True) as bar:
        def next_shard():
            for piece in stream.take(min(shard_size if shard else val_tokens, most - done)):
                yield piece
                bar.total = min(most, int((bar.n + len(piece)) / stream.fraction)) if stream.fraction else max_tokens
                bar.update(len(piece))
            if shard == 0 and not stream.more():
                fail(f"there are only {bar.n:,} tokens: --val_tokens {val_tokens} leaves none to train on, choose less")
        while shard == 0 or (done < most and stream.more()):
            done += write_shard(shard_path(data_dir, shard), next_shard())
            shard += 1
            progress |= {"shard": shard, "tokens": done}
            if done < most and stream.more():
                progress["document"], progress["token"] = stream.place()
                save_progress(data_dir, progress)
    save_progress(data_dir, progress | {"finished": True})
    print(f"{data_dir}: {done:,} tokens in {shard} shards")


def fetch(data_dir, repo, max_tokens):
    """Fetches published shards, validation first, until there are max_tokens; whole ones here already are kept."""
    from huggingface_hub import HfApi, hf_hub_download
    if os.path.exists(os.path.join(data_dir, "progress.json")):
        fail(f"{data_dir} holds shards made here (progress.json): give published ones another --data_dir")
    total = 0
    try:
        files = {e.path: e.size for e in HfApi().list_repo_tree(repo, repo_type="dataset") if e.path.endswith(".bin")}
        found = [(int(n), name) for name in files for n in re.findall(r"_(?:val|train)_(\d+)\.bin$", name)]
        if not found:
            fail(f"--dataset {repo}: no shards (*_val_000000.bin, *_train_000001.bin, ...) in it")
        for i, (n, name) in enumerate(sorted(found)):
            if max_tokens and total >= max_tokens and i > 1:  # i > 1: at least one to train on
                break
            path = shard_path(data_dir, n)
            try:
                whole = open_shard(path).nbytes + HEADER * 4 == files[name]
            except (OSError, ValueError):
                whole = False
            if not whole:
                with suppress(FileNotFoundError):
                    os.unlink(path)  # the client could take a damaged file for the one it once fetched
                os.replace(hf_hub_download(repo, name, repo_type="dataset", local_dir=data_dir), path)
            total += len(open_shard(path))
            print(f"{path}: {'fetched' if not whole else 'here already'}, {total:,} tokens by now")
    except Exception as e:
        fail(f"--dataset {repo}: fetching stopped ({why(e)}); start again to go on, what is whole stays")


def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--data_dir", default="fineweb10B", help="folder of the shards (default: %(default)s)")
    add("--dataset", help="on the hub (HuggingFaceFW/fineweb; with --pretokenized kjj0/fineweb10B-gpt2)")
    add("--name", help="its configuration (sample-10BT for fineweb and fineweb-edu, otherwise none)")
    add("--split", default="train", help="its split (%(default)s)")
    add("--files", nargs="+", metavar="PATTERN", help="local files instead: parquet, jsonl, json, txt, also .gz, .xz "
        "or .zst; each pattern's matches are sorted")
    add("--pretokenized", action="store_true", help="fetch published shards instead")
    add("--check", action="store_true", help="look for damage in the shards of data_dir and print a table")
    add("--max_tokens", type=positive, help="stop after so many tokens, validation included (all)")
    add("--shard_size", type=positive, default=10**8, help="tokens in a shard (%(default)s)")
    add("--val_tokens", type=positive, help="tokens in the validation shard (shard_size)")
    add("--num_proc", type=positive, default=cores, help="processes (all cores: %(default)s)")
    args = parser.parse_args()
    args.val_tokens = args.val_tokens or args.shard_size
    if args.files and (args.dataset or args.name or args.pretokenized):
        fail("--files goes with none of --dataset, --name, --pretokenized: choose one source")
    if max(args.val_tokens, args.shard_size) >= 2**31:
        fail("--shard_size and --val_tokens must be below 2147483648: a shard's header counts in int32")
    if args.max_tokens and args.max_tokens <= args.val_tokens and not args.pretokenized:
        fail(f"--max_tokens {args.max_tokens} leaves none to train on: give more than --val_tokens {args.val_tokens}")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # their warnings say less than fail's line
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    try:
        if args.check:
            sys.exit(check(args.data_dir))
        os.makedirs(args.data_dir, exist_ok=True)
        if args.pretokenized:
            return fetch(args.data_dir, args.dataset or "kjj0/fineweb10B-gpt2", args.max_tokens)
        dataset = args.dataset or "HuggingFaceFW/fineweb"
        sample = "sample-10BT" if dataset in ("HuggingFaceFW/fineweb", "HuggingFaceFW/fineweb-edu") else None
        source = (Files(args.files) if args.files else
                  Hub(dataset, args.name or sample, args.split, args.max_tokens is not None, args.num_proc))
        build(args.data_dir, source, args.shard_size, args.val_tokens, args.max_tokens, args.num_proc)
    except OSError as e:  # disk full, no permission, ...
        fail(f"{args.data_dir}: {why(e)}; put that right and start again to go on after the last finished shard")
    except KeyboardInterrupt:
        fail("interrupted; start again with the same options to go on after the last finished shard")


if __name__ == "__main__":
    main()
