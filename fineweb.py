"""
Text to shards of GPT-2 tokens: run once, before training.   pip install numpy tiktoken datasets tqdm

    python fineweb.py                                         # FineWeb sample-10BT into fineweb10B/: 10.3B tokens, 21 GB
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
import argparse, glob, io, itertools, json, multiprocessing, os, re, signal, sys, threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
import numpy as np  # the other packages are imported where used: each worker imports this file again

EOT, MAGIC, VERSION, HEADER = 50256, 20240520, 1, 256  # HEADER in int32, i.e. 1024 bytes

def fail(message):
    """Ends the program with one line on stderr and exit code 1."""
    sys.exit("fineweb.py: " + " ".join(message.split()))

def why(error):
    return f"{type(error).__name__}: {str(error)[:300]}".rstrip(": ")

# ---------------------------------------------------------------------------------------------------------------------
# shards

@contextmanager
def replacing(path):
    """A binary file that takes its name only once it is whole and on the disk; after an error nothing is left."""
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
    """Writes a shard, all or nothing, and returns its number of tokens.
    tokens: a sequence of ids below 65536, or a generator of such sequences (only one is held in memory)."""
    count = 0
    with replacing(path) as f:
        f.write(bytes(HEADER * 4))
        for part in [tokens] if hasattr(tokens, "__len__") else tokens:
            f.write(np.asarray(part, dtype=np.uint16).tobytes())
            count += len(part)
        f.seek(0)  # the count is known only now
        f.write(np.array([MAGIC, VERSION, count] + [0] * (HEADER - 3), dtype=np.int32).tobytes())
    return count

def open_shard(path):
    """The shard's tokens as a memory map, uint16. ValueError says what is wrong with the file, OSError if unreadable."""
    header = np.fromfile(path, dtype=np.int32, count=HEADER)
    if len(header) < HEADER or header[0] != MAGIC or header[1] != VERSION:
        raise ValueError(f"not a GPT-2 token shard (no {MAGIC}, {VERSION} at its start)")
    count, size = int(header[2]), os.path.getsize(path)
    if count < 1 or size != HEADER * 4 + 2 * count:
        raise ValueError(f"damaged: its header says {count} tokens, its size {(size - HEADER * 4) / 2:g}")
    return np.memmap(path, dtype=np.uint16, mode="r", offset=HEADER * 4, shape=(count,))

def shard_path(data_dir, index):
    return os.path.join(data_dir, f"fineweb_{'train' if index else 'val'}_{index:06d}.bin")

def check(data_dir):
    """Prints a table of all shards; exit code 1 if one is bad or missing."""
    paths = sorted(glob.glob(os.path.join(glob.escape(data_dir), "*.bin")), key=lambda p: ("_val_" not in p, p))
    if not paths:
        fail(f"no shards (*.bin) in {data_dir}: name their folder with --data_dir")
    indices = [int(m[1]) for m in (re.search(r"_(\d+)\.bin$", p) for p in paths) if m]
    missing = sorted(set(range(max(indices, default=0) + 1)) - set(indices))
    print(f"{'shard':<32}{'tokens':>13}{'documents':>11}{'largest id':>12}  {'starts with':<14}verdict")
    bad = total = 0
    for path in paths:
        count = documents = largest = 0
        begins, verdict = "", "ok"
        try:
            tokens = open_shard(path)
            count, begins = len(tokens), "a document" if tokens[0] == EOT else "a document's rest"
            for i in range(0, count, 1 << 24):  # 32 MB at a time
                documents += int((tokens[i:i + (1 << 24)] == EOT).sum())
                largest = max(largest, int(tokens[i:i + (1 << 24)].max()))
            if largest > EOT:
                verdict = f"BAD: GPT-2's ids end at {EOT}"
            elif "_val_" in path and tokens[0] != EOT:  # train shards rightly begin where the one before was cut
                verdict = f"BAD: the first token must be {EOT}"
        except (OSError, ValueError) as e:
            verdict = f"BAD: {e}"
        bad, total = bad + (verdict != "ok"), total + count
        print(f"{os.path.basename(path):<32}{count:>13,}{documents:>11,}{largest:>12}  {begins:<18}{verdict}")
    print(f"{len(paths)} shards, {total:,} tokens, {bad} bad" + f"; MISSING: {str(missing)[1:-1]}" * bool(missing))
    return 1 if bad or missing else 0

# ---------------------------------------------------------------------------------------------------------------------
# where text comes from: .id tells sources apart, .read(start) yields the documents from number start on as str (None in
# a table with holes), .fraction is how much of the whole has been read, None if that is unknown

def text_column(names, where):
    """The name of the text column: FineWeb says text, others TEXT."""
    for name in names:
        if name.lower() == "text":
            return name
    fail(f"{where}: no text column among: {', '.join(names)}")

def column_texts(tables, where):
    for table in tables:
        texts = table.column(0).to_pylist()
        if not all(text is None or isinstance(text, str) for text in texts):
            fail(f"{where}: the column {table.schema.names[0]} holds {table.schema.types[0]}, not text")
        yield from texts

def json_texts(stream, path):
    """One object a line, or one array of objects (that one is read whole)."""
    if stream.peek(1).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
        kind, rows = "element", json.load(stream)
    else:
        kind, rows = "line", stream
    for n, row in enumerate(rows, 1):
        if kind == "line":
            if row.isspace():
                continue
            try:
                row = json.loads(row)
            except ValueError as e:
                fail(f"{path} line {n}: not JSON ({e}); repair or drop the line")
        if not isinstance(row, dict):
            fail(f'{path} {kind} {n}: not an object like {{"text": "..."}}')
        text = row["text"] if "text" in row else row[text_column(row, f"{path} {kind} {n}")]
        if not (text is None or isinstance(text, str)):
            fail(f"{path} {kind} {n}: its text is of type {type(text).__name__}, not a string")
        yield text

def txt_texts(stream):
    """The whole file is one document, or several with <|endoftext|> between them (it never straddles lines)."""
    parts = []
    for line in io.TextIOWrapper(stream, encoding="utf-8", newline=""):
        head, *others = line.split("<|endoftext|>")
        parts.append(head)
        for other in others:
            yield "".join(parts)
            parts = [other]
    yield "".join(parts)

class Files:
    """Local files: jsonl, json, txt (plain, gz, xz, zst) and parquet."""
    kinds = re.compile(r"\.(?:(parquet)|(jsonl|json|txt)(?:\.(gz|xz|zst))?)$", re.IGNORECASE)

    def __init__(self, patterns):
        self.paths = {}  # path -> bytes; a dict keeps the order and drops what two patterns both match
        for pattern in patterns:
            found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
            found = [path for path in found if os.path.isfile(path)]
            if not found:
                fail(f"--files {pattern}: no such file")
            self.paths.update((path, os.path.getsize(path)) for path in found)
        for path in self.paths:
            if not self.kinds.search(path):
                fail(f"--files {path}: not a jsonl, json or txt file (plain, gz, xz, zst) nor parquet")
        self.id = {"files": [[os.path.basename(path), size] for path, size in self.paths.items()]}
        self.counts = []  # documents in the files read to their end, so that a resumed run need not read them again
        self.fraction = None

    def read(self, start):
        passed, total = 0, sum(self.paths.values())
        for i, (path, size) in enumerate(self.paths.items()):
            n = self.counts[i] if i < len(self.counts) else 0
            if n <= start and i < len(self.counts):
                start, passed = start - n, passed + size
                continue
            try:
                with open(path, "rb") as raw:
                    for n, text in enumerate(self.open(raw, path), 1):
                        if n > start:
                            self.fraction = (passed + raw.tell()) / total
                            yield text
            except Exception as e:  # each format and codec has errors of its own
                fail(f"{path}: cannot be read ({why(e)}); repair the file or leave it out")
            start, passed = max(0, start - n), passed + size
            self.counts[i:] = [n]

    def open(self, raw, path):
        parquet, kind, codec = (group and group.lower() for group in self.kinds.search(path).groups())
        if parquet:
            import pyarrow.parquet as pq
            file = pq.ParquetFile(raw, buffer_size=1 << 20)  # buffered: a column chunk can be gigabytes
            names = [text_column(file.schema_arrow.names, path)]
            return column_texts(file.iter_batches(batch_size=64, columns=names), path)
        if codec == "gz":
            import gzip
            raw = gzip.open(raw)
        elif codec == "xz":
            import lzma
            raw = lzma.open(raw)
        elif codec == "zst":
            import pyarrow
            raw = io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
        return txt_texts(raw) if kind == "txt" else json_texts(raw, path)

class Hub:
    """A dataset of the Hugging Face hub, fetched whole before anything else, or streamed."""
    def __init__(self, dataset, name, split, streaming, num_proc):
        from datasets import load_dataset
        self.id = {"dataset": dataset, "name": name, "split": split}
        self.where, self.counts, self.fraction = f"--dataset {dataset}", [], None
        procs = None if streaming or num_proc == 1 else min(num_proc, 16)  # 16: be gentle with the hub
        try:
            data = load_dataset(dataset, name=name, split=split, streaming=streaming, num_proc=procs)
            names = data.column_names or list(next(iter(data)))  # a stream without declared columns
        except Exception as e:  # no network, no such dataset, name or split: all kinds of types
            fail(f"{self.where}: cannot be loaded ({why(e)}); check the network, --dataset, --name, --split")
        splits = data.info.splits or {}  # a stream's length is known only if its card says it
        self.total = len(data) if not streaming else splits[split].num_examples if split in splits else None
        self.data = data.select_columns([text_column(names, self.where)]).with_format("arrow")

    def read(self, start):
        try:
            for n, text in enumerate(column_texts(self.data.skip(start).iter(batch_size=64), self.where), start + 1):
                self.fraction = n / self.total if self.total else None
                yield text
        except Exception as e:
            fail(f"{self.where}: reading stopped ({why(e)}); start again to go on after the last finished shard")

# ---------------------------------------------------------------------------------------------------------------------
# tokens: worker processes turn lists of documents into arrays, the parent puts them in order

def start_worker():
    """Runs in each worker. A parent killed with -9 cannot stop its workers, so they watch it."""
    import tiktoken
    global enc
    enc = tiktoken.get_encoding("gpt2")
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

def tokenize(texts):
    """-> all tokens of the documents (uint16), number of tokens of each (list; 0 for a blank one)."""
    ids = []
    for text in texts:
        if not text or text.isspace():
            ids.append(None)
            continue
        try:  # means encode_ordinary, but needs 1/9 of the memory and 5/6 of the time
            ids.append(enc.encode_to_numpy(text, disallowed_special=()))
        except UnicodeEncodeError:  # lone surrogates, as "\ud800" in JSON; encode_ordinary replaces them by U+FFFD
            ids.append(np.array(enc.encode_ordinary(text)))
    lengths = [0 if x is None else 1 + len(x) for x in ids]
    tokens = np.full(sum(lengths), EOT, dtype=np.uint16)
    end = 0
    for x, length in zip(ids, lengths):
        end += length
        if length:
            tokens[end - length + 1:end] = x
    return tokens, lengths

def tokenized(source, start, num_proc):
    """Yields tokenize()'s answers in order, each with the fraction of the source read by then."""
    pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), initializer=start_worker)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the workers: Ctrl-C is for the parent
    for _ in range(num_proc):
        pool.submit(int)  # a worker is started when a task finds none idle
    signal.signal(signal.SIGINT, handler)
    def tasks():  # big enough to make the cost of passing them on small, small enough to hold many in memory
        texts, size = [], 0
        for text in source.read(start):
            texts.append(text)
            size += len(text or "")
            if len(texts) == 256 or size >= 1_000_000:
                yield texts
                texts, size = [], 0
        yield texts
    try:
        pending = deque()
        for texts in tasks():
            pending.append((pool.submit(tokenize, texts), source.fraction))
            if len(pending) > 3 * num_proc:  # bounds the memory, whoever is slower
                future, fraction = pending.popleft()
                yield *future.result(), fraction
        for future, fraction in pending:
            yield *future.result(), fraction
    except BrokenProcessPool:
        fail("a worker process died, of too little memory perhaps: start again, with a smaller --num_proc")
    finally:
        pool.shutdown(cancel_futures=True)

class Stream:
    """The continuous token stream, from token `skip` of document `start` on."""
    def __init__(self, answers, start, skip):
        self.answers, self.start, self.i = answers, start, skip
        self.tokens, self.lengths, self.fraction = (), (), None

    def more(self):
        """True if a token is left; waits for it."""
        while self.i >= len(self.tokens):
            answer = next(self.answers, None)
            if answer is None:
                return False
            self.i -= len(self.tokens)
            self.start += len(self.lengths)
            self.tokens, self.lengths, self.fraction = answer
        return True

    def take(self, n):
        """Yields the next n tokens in pieces; fewer at the end of the stream."""
        while n and self.more():
            piece = self.tokens[self.i:self.i + n]
            self.i += len(piece)
            n -= len(piece)
            yield piece

    def place(self):
        """-> number of the document that the next token belongs to, number of the token in it."""
        ends = np.cumsum(self.lengths)
        d = int(np.searchsorted(ends, self.i, side="right"))
        return self.start + d, self.i - int(ends[d] - self.lengths[d])

# ---------------------------------------------------------------------------------------------------------------------

def save_progress(data_dir, progress):
    with replacing(os.path.join(data_dir, "progress.json")) as f:
        f.write(json.dumps(progress).encode())

def load_progress(data_dir, options):
    """What is done in the folder and where the next shard starts. A folder that holds anything else is left alone."""
    path = os.path.join(data_dir, "progress.json")
    fresh = {"options": options, "shard": 0, "document": 0, "token": 0, "counts": [], "tokens": 0, "finished": False}
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
        if shards == 0:  # nothing to lose
            return fresh
        other = ", ".join(f"--{k} {str(old[k])[:80]}" for k in old if old[k] != options.get(k))
        fail(f"{data_dir} was begun with {other or 'other options'}: give the same options, or another --data_dir")
    for i in range(shards):
        try:
            open_shard(shard_path(data_dir, i))
        except (OSError, ValueError) as e:
            fail(f"{shard_path(data_dir, i)}: {why(e)}; put it back, or delete {path} and the shards and start again")
    return progress

def build(data_dir, source, shard_size, val_tokens, max_tokens, num_proc):
    """Tokenizes the source into shards, or goes on with it."""
    from tqdm import tqdm
    options = {**source.id, "shard_size": shard_size, "val_tokens": val_tokens, "max_tokens": max_tokens}
    progress = load_progress(data_dir, options)
    shard, done, source.counts = progress["shard"], progress["tokens"], progress["counts"]
    if progress["finished"]:
        print(f"{data_dir}: finished, {done:,} tokens in {shard} shards; nothing to do")
        return
    try:
        import tiktoken
        tiktoken.get_encoding("gpt2")  # the workers then find its files in the cache
    except Exception as e:
        fail(f"GPT-2's vocabulary cannot be had ({why(e)}): connect once, or point TIKTOKEN_CACHE_DIR at a copy")
    save_progress(data_dir, progress)
    if shard:
        print(f"{data_dir}: going on after {shard} shards, {done:,} tokens")
    answers = tokenized(source, progress["document"], num_proc)
    stream = Stream(answers, progress["document"], progress["token"])
    with closing(answers), tqdm(initial=done, total=max_tokens, unit="tok", unit_scale=True, smoothing=0.05) as bar:
        def part(limit):
            for piece in stream.take(limit):
                yield piece
                bar.update(len(piece))
                if stream.fraction:
                    bar.total = min(max_tokens or sys.maxsize, int(bar.n / stream.fraction))
            if shard == 0 and not stream.more():
                bar.leave = False
                fail(f"there are only {bar.n:,} tokens: --val_tokens {val_tokens} (default: --shard_size) leaves none "
                     "to train on, choose a smaller one")
        left = max_tokens or sys.maxsize
        while left > done and stream.more():
            done += write_shard(shard_path(data_dir, shard), part(min(shard_size if shard else val_tokens, left - done)))
            shard += 1
            if done < left and stream.more():
                document, token = stream.place()
                progress |= {"shard": shard, "document": document, "token": token, "tokens": done}
                save_progress(data_dir, progress)
    save_progress(data_dir, progress | {"shard": shard, "tokens": done, "finished": True})
    print(f"{data_dir}: {done:,} tokens in {shard} shards")

def fetch(data_dir, repo, max_tokens):
    """Fetches published shards, validation first, until there are max_tokens; the whole ones already here stay."""
    from huggingface_hub import HfApi, hf_hub_download
    if os.path.exists(os.path.join(data_dir, "progress.json")):
        fail(f"{data_dir} holds shards made here (progress.json): choose another --data_dir for published ones")
    try:
        found = [(re.search(r"_(val|train)_(\d+)\.bin$", e.path), e) for e in HfApi().list_repo_tree(repo, repo_type="dataset")]
        found = sorted(((m[1] == "train", int(m[2])), e.path, e.size) for m, e in found if m)
        if not found:
            fail(f"--dataset {repo}: no shards named *_val_000000.bin or *_train_000001.bin in it")
        tokens = 0
        for n, ((train, index), name, size) in enumerate(found):
            if max_tokens and tokens >= max_tokens and n > 1:  # one to train on at least
                break
            path = shard_path(data_dir, index)
            print(f"{path} ({n + 1} of at most {len(found)})")
            with suppress(OSError, ValueError):
                if open_shard(path).nbytes + HEADER * 4 == size:
                    tokens += open_shard(path).size
                    continue
            os.replace(hf_hub_download(repo, name, repo_type="dataset", local_dir=data_dir), path)
            tokens += open_shard(path).size
    except Exception as e:
        fail(f"--dataset {repo}: fetching stopped ({why(e)}); what is whole stays, start again to go on")
    print(f"{data_dir}: {tokens:,} tokens")

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail

    def positive(text):
        if int(text) < 1:
            raise ValueError
        return int(text)
    positive.__name__ = "positive whole number"  # for argparse's message
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--data_dir", default="fineweb10B", help="where the shards go (default: %(default)s)")
    parser.add_argument("--dataset", help="on the hub (default: HuggingFaceFW/fineweb; "
                                          "with --pretokenized kjj0/fineweb10B-gpt2)")
    parser.add_argument("--name", help="its configuration (default: sample-10BT for FineWeb and FineWeb-Edu, else none)")
    parser.add_argument("--split", default="train", help="its split (default: %(default)s)")
    parser.add_argument("--files", nargs="+", metavar="PATTERN", help="instead: local jsonl, json, txt (or .gz, .xz, .zst) "
                        "and parquet files; the matches of each pattern are sorted")
    parser.add_argument("--pretokenized", action="store_true", help="instead: fetch published shards")
    parser.add_argument("--check", action="store_true", help="validate the shards in data_dir and print a table")
    parser.add_argument("--max_tokens", type=positive, help="stop after so many, validation included (default: all)")
    parser.add_argument("--shard_size", type=positive, default=10**8, help="tokens (default: %(default)s)")
    parser.add_argument("--val_tokens", type=positive, help="size of the validation shard (default: shard_size)")
    parser.add_argument("--num_proc", type=positive, default=cores, help="processes (default: all cores, %(default)s)")
    args = parser.parse_args()
    val_tokens = args.val_tokens or args.shard_size
    if args.files and (args.dataset or args.name or args.pretokenized):
        fail("--files goes with none of --dataset, --name, --pretokenized: choose one source")
    if max(val_tokens, args.shard_size) >= 2**31:
        fail("--shard_size and --val_tokens must be below 2147483648: the header counts in int32")
    if args.max_tokens and not args.pretokenized and args.max_tokens <= val_tokens:
        fail(f"--max_tokens {args.max_tokens} leaves none to train on: it must be above --val_tokens {val_tokens}")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # what matters reaches the user in fail's line
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    try:
        if args.check:
            sys.exit(check(args.data_dir))
        os.makedirs(args.data_dir, exist_ok=True)
        if args.pretokenized:
            return fetch(args.data_dir, args.dataset or "kjj0/fineweb10B-gpt2", args.max_tokens)
        dataset = args.dataset or "HuggingFaceFW/fineweb"
        name = args.name or ("sample-10BT" if dataset in ("HuggingFaceFW/fineweb", "HuggingFaceFW/fineweb-edu") else None)
        source = Files(args.files) if args.files else Hub(dataset, name, args.split, bool(args.max_tokens), args.num_proc)
        build(args.data_dir, source, args.shard_size, val_tokens, args.max_tokens, args.num_proc)
    except OSError as e:  # disk full, no permission, ...
        fail(f"{args.data_dir}: {why(e)}; put that right and start again: it goes on after the last finished shard")
    except KeyboardInterrupt:
        fail("interrupted; start again with the same options to go on after the last finished shard")

if __name__ == "__main__":
    main()
