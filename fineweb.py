"""
Turn text into shards of GPT-2 tokens. Run this once, before training.

    python fineweb.py                  # FineWeb sample-10BT to fineweb10B/: 10.3B tokens, 21 GB
    python fineweb.py --max_tokens 300000000  # a sample; downloads only the text that it needs
    python fineweb.py --pretokenized --max_tokens 1000000000  # published shards of the same data
    python fineweb.py --dataset HuggingFaceFW/fineweb-edu --name sample-10BT --data_dir edu10B
    python fineweb.py --dataset manu/project_gutenberg --split en --data_dir gutenberg
    python fineweb.py --files 'books/*.txt' wiki.jsonl.xz --val_tokens 1000000 --data_dir mine
    python fineweb.py --check          # look for damaged and missing shards

The program may be killed at any moment. Started again with the same options, it resumes after the
last finished shard. The bytes of the shards do not depend on interruptions or on --num_proc.

The documents form one sequence of tokens: <|endoftext|> (50256) stands in front of each document,
and blank documents are left out. The first val_tokens tokens become fineweb_val_000000.bin. The
rest becomes fineweb_train_000001.bin, fineweb_train_000002.bin, ... of shard_size tokens each; a
document may begin in one shard and end in the next. A shard has llm.c's format: a header of 256
int32 (20240520, 1, number of tokens, zeros), then the tokens as uint16.
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

EOT = 50256  # <|endoftext|>, the largest token id of GPT-2
MAGIC, VERSION = 20240520, 1  # the first two numbers of a shard
HEADER_BYTES = 256 * 4


# ---- errors and files (all scripts use these) ----------------------------------------------------

def fail(message):
    """End the program with exit code 1 and the message as one line on stderr."""
    sys.exit("error: " + " ".join(str(message).split())[:500])


def describe(error):
    """Return the type and the message of an exception."""
    return f"{type(error).__name__}: {str(error)[:300]}"


@contextmanager
def explain(message, *errors):
    """Turn errors of the given types into one line: the message, then what the error says."""
    try:
        yield
    except errors as e:
        fail(f"{message}: {e}")


@contextmanager
def one_line_errors():
    """Turn I/O and out-of-memory errors into one line. Use it as a decorator."""
    try:
        yield
    except OSError as e:
        fail(e)
    except RuntimeError as e:  # PyTorch's words: the first for a GPU, the second for the CPU
        if "out of memory" not in str(e) and "can't allocate memory" not in str(e):
            raise
        fail("out of memory: lower --batch_size (the result is the same: gradients accumulate)")


class Parser(argparse.ArgumentParser):
    """A parser of options whose errors are one line."""

    def error(self, message):
        fail(f"{message} (--help lists the options)")


@contextmanager
def replacing(path):
    """Open path.tmp for writing; rename it to path once it is whole and on the disk; delete it
    after an error. Raise OSError, with the path, if it cannot be written."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path + ".tmp", "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except BaseException as e:
        with suppress(OSError):
            os.unlink(path + ".tmp")
        if isinstance(e, OSError) or isinstance(e.__context__, OSError):  # torch.save wraps it
            raise OSError(f"cannot write {path}: {e}; what was there before is untouched") from e
        raise


# ---- shards --------------------------------------------------------------------------------------


def write_shard(path, tokens):
    """Write a shard, or nothing after an error, and return its number of tokens.
    tokens: a sequence of ids below 65536, or a generator of such sequences, which saves memory."""
    count = 0
    with replacing(path) as f:
        f.write(bytes(HEADER_BYTES))
        for piece in [tokens] if hasattr(tokens, "__len__") else tokens:
            f.write(np.asarray(piece, dtype=np.uint16).tobytes())
            count += len(piece)
        f.seek(0)  # the header comes last, because only now is the count known
        f.write(np.array([MAGIC, VERSION, count], dtype=np.int32).tobytes())
    return count


def open_shard(path):
    """Return the tokens of a shard, a memory-mapped array of uint16.
    Raise ValueError if the file is not a whole shard, and OSError if it cannot be read."""
    header = np.fromfile(path, dtype=np.int32, count=HEADER_BYTES // 4)
    if header.nbytes < HEADER_BYTES or header[0] != MAGIC or header[1] != VERSION:
        raise ValueError(f"not a GPT-2 token shard (it does not start with {MAGIC}, {VERSION})")
    count, size = int(header[2]), os.path.getsize(path)
    if count < 1 or size != HEADER_BYTES + 2 * count:
        raise ValueError(f"damaged: its header says {count} tokens, but it has {size} bytes")
    return np.memmap(path, dtype=np.uint16, mode="r", offset=HEADER_BYTES, shape=(count,))


class TokenSequence:
    """Shards, one after the other, as an endless sequence of tokens: after the last it repeats."""

    def __init__(self, paths, shards, vocab_size):
        self.paths = paths
        self.shards = shards
        self.vocab_size = vocab_size
        self.ends = np.cumsum([len(shard) for shard in shards])  # where each shard ends

    def __len__(self):
        """Return the number of tokens after which the sequence repeats."""
        return int(self.ends[-1])

    def read(self, start, n):
        """Return tokens [start, start + n), an array of uint16."""
        tokens = np.empty(n, np.uint16)
        filled = 0
        while filled < n:
            position = (start + filled) % len(self)
            i = int(np.searchsorted(self.ends, position, side="right"))
            start_of_shard = int(self.ends[i]) - len(self.shards[i])
            piece = self.shards[i][position - start_of_shard:][:n - filled]
            if piece.max() >= self.vocab_size:
                fail(f"{self.paths[i]} holds token {piece.max()}, beyond "
                     f"--vocab_size={self.vocab_size}")
            tokens[filled:filled + len(piece)] = piece
            filled += len(piece)
        return tokens


def open_shards(data_dir, split, vocab_size):
    """Return the shards of a split, "train" or "val", in the order of their names."""
    pattern = f"*_{split}_*.bin"
    paths = sorted(glob.glob(os.path.join(glob.escape(data_dir), pattern)))
    if not paths:
        fail(f"no {split} shards ({pattern}) in {data_dir}: make them with fineweb.py, or use "
             "--data_dir=DIR")
    shards = []
    for path in paths:
        with explain(path, OSError, ValueError):
            shards.append(open_shard(path))
    return TokenSequence(paths, shards, vocab_size)


def shard_path(data_dir, index):
    """Return the path of the validation shard (index 0) or of a train shard (1, 2, ...)."""
    split = "val" if index == 0 else "train"
    return os.path.join(data_dir, f"fineweb_{split}_{index:06d}.bin")


def check(data_dir):
    """Print a table of the shards. Return the exit code: 1 if a shard is bad or missing, else 0."""
    paths = sorted(glob.glob(os.path.join(glob.escape(data_dir), "*.bin")))
    if not paths:
        fail(f"no shards (*.bin) in {data_dir}; give their folder with --data_dir")
    names = {path: os.path.basename(path) for path in paths}
    paths.sort(key=lambda path: "_val_" not in names[path])  # validation first: False comes first
    format_row = "{:<28}{:>13}{:>11}{:>12}  {:<17}{}".format
    print(format_row("shard", "tokens", "documents", "largest id", "starts with", "verdict"))
    total = bad = 0
    for path in paths:
        count = documents = largest = 0
        start, verdict = "", "ok"
        try:
            tokens = open_shard(path)
            count, largest = len(tokens), int(tokens.max())
            blocks = np.array_split(tokens, 64)  # one after the other, to save memory
            documents = sum(np.count_nonzero(block == EOT) for block in blocks)
            start = "a document" if tokens[0] == EOT else "a remainder"
            if largest > EOT:
                verdict = f"BAD: the token ids of GPT-2 end at {EOT}"
            elif "_val_" in names[path] and tokens[0] != EOT:  # train shards may continue one
                verdict = f"BAD: its first token is not {EOT}"
        except (OSError, ValueError) as e:
            verdict = f"BAD: {e}"
        total += count
        if verdict != "ok":
            bad += 1
        print(format_row(names[path], f"{count:,}", f"{documents:,}", largest, start, verdict))
    present = {int(n) for n in re.findall(r"_(\d+)\.bin$", "\n".join(paths), re.MULTILINE)}
    missing = [str(i) for i in range(max(present, default=0)) if i not in present]
    gaps = f", MISSING: {', '.join(missing)}" if missing else ""
    print(f"{len(paths)} shards, {total:,} tokens, {bad} bad{gaps}")
    return 1 if bad or missing else 0


# ---- sources of text -----------------------------------------------------------------------------
# A source is an object with the attributes
#   id           the options that chose it, a dictionary for progress.json
#   read(start)  yields the documents from number `start` on: str, or None for an empty table cell
#   fraction     how much of the whole has been read, from 0 to 1; None if unknown
#   counts       number of documents of each file read to its end, to skip it later (Files only)

def text_column(names, where):
    """Return the name of the text column: text in FineWeb, Text or TEXT in other data."""
    for name in names:
        if name.lower() == "text":
            return name
    fail(f"{where}: no text column among: {', '.join(names)}; rename the right one to text")


def column_texts(tables, where):
    """Yield the texts of Arrow tables of one column."""
    for table in tables:
        column = table.schema.field(0)
        if not re.search("string|null", str(column.type)):
            fail(f"{where}: the column {column.name} holds {column.type}; it must hold strings")
        yield from table.column(0).to_pylist()


def json_texts(stream, path):
    """Yield the texts of JSON objects: one object a line, or an array, which is read whole."""
    # a byte order mark and white space may come before the array
    is_array = stream.peek(1).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    unit = "element" if is_array else "line"
    for number, row in enumerate(json.load(stream) if is_array else stream, 1):
        where = f"{path} {unit} {number}"
        if not is_array:
            if row.isspace():
                continue
            try:
                row = json.loads(row)
            except ValueError as e:
                fail(f"{where}: not JSON ({e}); repair or delete it")
        if not isinstance(row, dict):
            fail(f'{where}: not an object like {{"text": "..."}}; repair or delete it')
        text = row["text"] if "text" in row else row[text_column(row, where)]
        if text is not None and not isinstance(text, str):
            fail(f"{where}: its text has type {type(text).__name__}, not str; repair or delete it")
        yield text


def txt_texts(stream):
    """Yield the documents of a plain text: one, or several with <|endoftext|> between them."""
    # newline="" keeps \r\n; without a name for it the stream would be closed after the loop, but
    # Files.read still asks for its position
    lines = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    parts = []  # of the current document
    for line in lines:
        end_of_document, *next_documents = line.split("<|endoftext|>")
        parts.append(end_of_document)
        for text in next_documents:
            yield "".join(parts)
            parts = [text]
    yield "".join(parts)


class Files:
    """Local files as a source of text."""
    file_type = re.compile(r"\.(parquet|(?:jsonl|json|txt)(?:\.(?:gz|xz|zst))?)$", re.IGNORECASE)

    def __init__(self, patterns):
        self.sizes = {}  # path -> bytes, in reading order; a file matched twice is read once
        for pattern in patterns:
            # the name of an existing file is no pattern, even if it contains [ or *
            matches = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
            paths = [path for path in sorted(matches) if os.path.isfile(path)]
            if os.path.isdir(pattern):
                fail(f"--files {pattern}: this is a folder; use --files '{pattern}/*.txt'")
            if not paths:
                fail(f"--files {pattern}: no such file; check the name")
            for path in paths:
                if not self.file_type.search(path):
                    fail(f"--files {path}: unknown type of file; --help lists the known types")
                self.sizes[path] = os.path.getsize(path)
        self.id = {"files": [[os.path.basename(path), size] for path, size in self.sizes.items()]}
        self.counts, self.fraction = [], None

    def read(self, start):
        total_bytes = sum(self.sizes.values())
        bytes_before = 0  # in the files before the current one
        for i, (path, size) in enumerate(self.sizes.items()):
            # counts[i] is known if file i was read to its end; skip it if `start` lies behind it
            known = i < len(self.counts)
            if not known or start < self.counts[i]:
                count = 0
                try:
                    with open(path, "rb") as raw:
                        for count, text in enumerate(self.texts(raw, path), 1):
                            if count > start:
                                self.fraction = (bytes_before + raw.tell()) / total_bytes
                                yield text
                except Exception as e:  # every format and every codec has its own exceptions
                    fail(f"{path}: cannot be read ({describe(e)}); repair it or leave it out")
                if not known:
                    self.counts.append(count)
            start = max(0, start - self.counts[i])
            bytes_before += size

    def texts(self, raw, path):
        """Return an iterator over the documents of an open file."""
        kind, _, codec = self.file_type.search(path)[1].lower().partition(".")  # "jsonl", "gz"
        if kind == "parquet":
            import pyarrow.parquet
            # the buffer is small, because a column chunk may be larger than the memory
            file = pyarrow.parquet.ParquetFile(raw, buffer_size=1 << 20)
            column = text_column(file.schema_arrow.names, path)
            return column_texts(file.iter_batches(64, columns=[column]), path)
        if codec == "gz":
            raw = gzip.open(raw)
        elif codec == "xz":
            raw = lzma.open(raw)
        elif codec == "zst":
            import pyarrow
            raw = io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
        return txt_texts(raw) if kind == "txt" else json_texts(raw, path)


class Hub:
    """A dataset of the Hugging Face hub as a source of text, downloaded whole or streamed."""

    def __init__(self, dataset, name, split, streaming, num_proc):
        from datasets import load_dataset
        self.id = {"dataset": dataset, "name": name, "split": split}
        self.where = f"--dataset {dataset}"
        self.counts, self.fraction = [], None
        # at most 16 processes, because the hub limits the rate of requests
        downloaders = None if streaming or num_proc == 1 else min(num_proc, 16)
        try:
            data = load_dataset(dataset, name=name, split=split, streaming=streaming,
                                num_proc=downloaders)
            # a stream may not declare its columns, but its rows have them
            names = data.column_names or list(next(iter(data)))
        except Exception as e:  # many types: no network, no such dataset, name or split
            fail(f"{self.where}: cannot be loaded ({describe(e)}); "
                 "check the network, --dataset, --name and --split")
        self.total = None if streaming else len(data)  # number of documents, None if unknown
        if streaming and split in (data.info.splits or {}):
            self.total = data.info.splits[split].num_examples
        self.data = data.select_columns([text_column(names, self.where)]).with_format("arrow")

    def read(self, start):
        tables = self.data.skip(start).iter(64)
        try:
            for number, text in enumerate(column_texts(tables, self.where), start + 1):
                self.fraction = number / self.total if self.total else None
                yield text
        except Exception as e:
            fail(f"{self.where}: reading stopped ({describe(e)}); start again to resume")


# ---- vocabularies --------------------------------------------------------------------------------

class Bytes:
    """The tokenizer of a vocabulary of 256: a token is a byte."""
    n_vocab = 256
    eot_token = 0

    def encode_ordinary(self, text):
        return list(text.encode(errors="replace"))

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def get_tokenizer(vocab_size):
    """Return Bytes for a vocabulary of 256, GPT-2's BPE for 50,257 tokens or more. For any other
    size, or if the BPE is neither in tiktoken's cache nor to be downloaded, say why and return
    None."""
    if vocab_size == 256:
        return Bytes()
    if vocab_size < 50257:
        reason = (f"--vocab_size={vocab_size} is neither that of bytes, 256, nor GPT-2's, 50257 or "
                  "more, and no other vocabulary is known")
    else:
        import tiktoken
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as e:
            reason = (f"GPT-2's BPE cannot be downloaded ({type(e).__name__}); set "
                      "TIKTOKEN_CACHE_DIR to a folder into which tiktoken has downloaded it before")
    if os.environ.get("RANK", "0") == "0":  # torchrun's processes would all say the same
        print(f"no tokenizer, so no samples and no HellaSwag: {reason}", file=sys.stderr)
    return None


def end_of_text(vocab_size):
    """Return the token that get_tokenizer's tokenizer has as eot_token; None if it is unknown."""
    if vocab_size == 256:
        return Bytes.eot_token
    return EOT if vocab_size > EOT else None


def merges_of(ranks):
    """Return the pairs that a BPE merges, first to last: a list of (bytes, bytes).

    ranks: {bytes: rank}, as tiktoken keeps a vocabulary. A token is made of the two parts that are
    left when its bytes are merged as far as the tokens of lower rank allow."""
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
            i = pairs.index(min(pairs))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def save_tokenizer(folder, vocab_size, block_size):
    """Write tokenizer.json and tokenizer_config.json, from which transformers makes a tokenizer
    with the ids of get_tokenizer's. Return whether there is one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    tokenizer = get_tokenizer(vocab_size)
    if tokenizer is None:
        return False
    is_bytes = isinstance(tokenizer, Bytes)
    # the file spells a byte as a character that can be printed: GPT-2's 256, in the order of bytes
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    spelling = {byte: chr(byte) for byte in visible}
    spelling |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}

    def spell(token):
        return "".join(spelling[byte] for byte in token)

    ranks = {bytes([i]): i for i in range(256)} if is_bytes else tokenizer._mergeable_ranks
    vocab = {spell(token): rank for token, rank in ranks.items()}
    # llama.cpp's converter knows GPT-2's vocabulary by this name
    config = {"tokenizer_class": "PreTrainedTokenizerFast" if is_bytes else "GPT2Tokenizer",
              "model_max_length": block_size,
              "model_input_names": ["input_ids", "attention_mask"],
              "clean_up_tokenization_spaces": False}
    merges = [(spell(a), spell(b)) for a, b in merges_of(ranks)]
    saved = Tokenizer(models.BPE(vocab, merges))
    # this first splits the text into words by GPT-2's pattern
    saved.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    saved.decoder = decoders.ByteLevel()
    if not is_bytes:  # the end of a text is no text of its own there, but the byte 0
        saved.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
        config |= dict.fromkeys(["bos_token", "eos_token"], "<|endoftext|>")
    saved.save(os.path.join(folder, "tokenizer.json"))
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as file:
        json.dump(config, file, indent=1)
    return True


# ---- tokens --------------------------------------------------------------------------------------
# Worker processes tokenize lists of documents. The parent process keeps the lists in order.

def start_worker():
    """Load the tokenizer in a new worker, and make the worker end when the parent ends."""
    import tiktoken
    global encoding
    encoding = tiktoken.get_encoding("gpt2")
    parent = multiprocessing.parent_process()

    def exit_after_parent():  # a parent killed by SIGKILL cannot stop its workers
        parent.join()
        os._exit(1)
    threading.Thread(target=exit_after_parent, daemon=True).start()


def tokenize(texts):
    """Return the tokens of all documents (uint16), and a list of the number of tokens of each.
    Each document counts with the EOT before it; a blank document has 0 tokens."""
    parts = [np.zeros(0, np.uint16)]  # np.concatenate needs at least one array
    lengths = []
    for text in texts:
        if not text or text.isspace():
            lengths.append(0)
            continue
        try:  # the same ids as encode_ordinary, in 5/6 of the time and a tenth of the memory
            ids = encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate, "\ud800" in JSON; here it becomes U+FFFD
            ids = encoding.encode_ordinary(text)
        parts += [[EOT], ids]
        lengths.append(1 + len(ids))
    return np.concatenate(parts, dtype=np.uint16, casting="unsafe"), lengths


def batches(texts):
    """Yield lists of documents. A list is large, because each one costs a round trip to a worker,
    but its size is limited, because many lists are in memory."""
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text or "")
        if len(batch) == 256 or characters >= 1_000_000:
            yield batch
            batch, characters = [], 0
    yield batch


def tokenized(source, start, num_proc):
    """Yield (tokens, lengths, fraction) for each batch of source.read(start), in order. The first
    two come from tokenize; fraction is source.fraction after the batch was read."""
    pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"),
                               initializer=start_worker)
    # workers inherit that SIGINT is ignored: Ctrl-C reaches all processes, only the parent reacts
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for _ in range(num_proc):
        pool.submit(int)  # a task that does nothing, but starts a worker if none is idle
    signal.signal(signal.SIGINT, handler)
    pending = deque()  # (future, fraction) of each batch that is with the workers
    try:
        for batch in batches(source.read(start)):
            pending.append((pool.submit(tokenize, batch), source.fraction))
            if len(pending) > 3 * num_proc:  # limits the memory if the workers are slow
                future, fraction = pending.popleft()
                yield *future.result(), fraction
        for future, fraction in pending:
            yield *future.result(), fraction
    except BrokenProcessPool:
        fail("a worker died, perhaps for lack of memory; resume with a smaller --num_proc")
    finally:
        pool.shutdown(cancel_futures=True)


class TokenReader:
    """Reader of the token sequence, from token `skip` of document `document` on.
    results: iterator over (tokens, lengths, fraction); its first batch starts at that document."""

    def __init__(self, results, document, skip):
        self.results = results
        self.document = document  # number of the first document of the current batch
        self.tokens, self.lengths, self.fraction = [], [], None  # the current batch: none yet
        self.index = skip  # of the next token, counted from the start of the current batch

    def has_next(self):
        """Wait until the next token is there. Return False at the end of the sequence."""
        while self.index >= len(self.tokens):
            result = next(self.results, None)
            if result is None:
                return False
            self.index -= len(self.tokens)
            self.document += len(self.lengths)
            self.tokens, self.lengths, self.fraction = result
        return True

    def take(self, n):
        """Yield the next n tokens in pieces, or fewer tokens if the sequence ends."""
        while n > 0 and self.has_next():
            piece = self.tokens[self.index:self.index + n]
            self.index += len(piece)
            n -= len(piece)
            yield piece

    def position(self):
        """Return the document of the next token, which must exist, and the token's index in it."""
        ends = np.cumsum(self.lengths)
        i = int(np.searchsorted(ends, self.index, side="right"))  # its document in the batch
        return self.document + i, self.index - int(ends[i] - self.lengths[i])


# ---- making the shards ---------------------------------------------------------------------------

def save_progress(data_dir, progress):
    """Write progress.json."""
    with replacing(os.path.join(data_dir, "progress.json")) as f:
        f.write(json.dumps(progress).encode())


def load_progress(data_dir, options):
    """Return what is done in the folder and where the next shard starts. End the program rather
    than overwrite shards that were made with other options."""
    path = os.path.join(data_dir, "progress.json")
    fresh = {"options": options, "shard": 0, "document": 0, "token": 0, "tokens": 0, "counts": [],
             "finished": False}
    if not os.path.exists(path):
        if glob.glob(os.path.join(glob.escape(data_dir), "*.bin")):
            fail(f"{data_dir} has shards but no progress.json; use another --data_dir")
        return fresh
    try:
        with open(path) as f:
            progress = json.load(f)
        old_options, shards = progress["options"], progress["shard"]
    except (ValueError, KeyError, TypeError):
        fail(f"{path} is damaged; delete it and the shards beside it, or use another --data_dir")
    if old_options != options:
        if shards == 0:
            return fresh
        old = " ".join(f"--{name} {str(value)[:60]}" for name, value in old_options.items()
                       if value != options.get(name))
        fail(f"{data_dir} was begun with {old}; use the same options, or another --data_dir")
    for i in range(shards):
        try:
            open_shard(shard_path(data_dir, i))
        except (OSError, ValueError) as e:
            fail(f"{shard_path(data_dir, i)}: {describe(e)}; "
                 f"restore it, or delete {path} and all shards to start afresh")
    return progress


def show_progress(pieces, bar, reader, limit):
    """Yield the pieces, and advance the progress bar after each. The bar's total is estimated from
    the fraction of the source that has been read."""
    for piece in pieces:
        yield piece
        if reader.fraction:
            bar.total = min(limit, int((bar.n + len(piece)) / reader.fraction))
        bar.update(len(piece))


def make_shards(data_dir, source, shard_size, val_tokens, max_tokens, num_proc):
    """Make the shards, or resume making them. max_tokens=None means no limit."""
    import tiktoken
    from tqdm import tqdm
    options = {**source.id, "shard_size": shard_size, "val_tokens": val_tokens,
               "max_tokens": max_tokens}
    progress = load_progress(data_dir, options)
    shard, done = progress["shard"], progress["tokens"]
    if progress["finished"]:
        print(f"{data_dir}: finished before, {done:,} tokens in {shard} shards; nothing to do")
        return
    try:
        tiktoken.get_encoding("gpt2")  # download it to the cache, from which the workers load it
    except Exception as e:
        fail(f"cannot load GPT-2's vocabulary ({describe(e)}); "
             "connect to the network once, or set TIKTOKEN_CACHE_DIR to a copy")
    source.counts = progress["counts"]  # the same list, so what the source appends is saved
    save_progress(data_dir, progress)
    limit = max_tokens or sys.maxsize
    results = tokenized(source, progress["document"], num_proc)
    reader = TokenReader(results, progress["document"], progress["token"])
    with closing(results), tqdm(initial=done, total=max_tokens, unit="tok", unit_scale=True) as bar:
        unfinished = shard == 0 or reader.has_next()
        while unfinished:
            path = shard_path(data_dir, shard)
            size = val_tokens if shard == 0 else shard_size
            pieces = reader.take(min(size, limit - done))
            done += write_shard(path, show_progress(pieces, bar, reader, limit))
            unfinished = done < limit and reader.has_next()
            if shard == 0 and not unfinished:
                os.unlink(path)
                fail(f"there are only {done:,} tokens; lower --val_tokens to keep some to train on")
            shard += 1
            progress |= {"shard": shard, "tokens": done}
            if unfinished:
                progress["document"], progress["token"] = reader.position()
                save_progress(data_dir, progress)
    save_progress(data_dir, progress | {"finished": True})
    print(f"{data_dir}: {done:,} tokens in {shard} shards")


def fetch_shards(data_dir, repo, max_tokens):
    """Download published shards, validation first, until there are max_tokens (None: all). Shards
    that are in the folder already are kept if they are whole."""
    from huggingface_hub import HfApi, hf_hub_download
    if os.path.exists(os.path.join(data_dir, "progress.json")):
        fail(f"{data_dir} holds shards made here (progress.json); use another --data_dir")
    total = 0
    try:
        published = []  # (index, name, bytes) of each shard
        for entry in HfApi().list_repo_tree(repo, repo_type="dataset"):
            match = re.search(r"_(?:val|train)_(\d+)\.bin$", entry.path)
            if match:
                published.append((int(match[1]), entry.path, entry.size))
        if not published:
            fail(f"--dataset {repo}: no shards (*_val_000000.bin, *_train_000001.bin, ...) in it")
        for i, (index, name, size) in enumerate(sorted(published)):
            if max_tokens and total >= max_tokens and i >= 2:  # at least one to train on
                break
            path = shard_path(data_dir, index)
            try:
                whole = open_shard(path).nbytes + HEADER_BYTES == size
            except (OSError, ValueError):
                whole = False
            if not whole:
                with suppress(FileNotFoundError):
                    os.unlink(path)  # or the client may take a damaged file for its download
                file = hf_hub_download(repo, name, repo_type="dataset", local_dir=data_dir)
                os.replace(file, path)
            total += len(open_shard(path))
            print(f"{path}: {'already here' if whole else 'downloaded'}, {total:,} tokens so far")
    except Exception as e:
        fail(f"--dataset {repo}: download stopped ({describe(e)}); start again to resume")


def write_builtin_text(folder):
    """Write shards of the Python reference manual, which every Python contains, unless they exist.
    Each byte of the text is a token, and a byte 0 stands in front of each document."""
    from pydoc_data.topics import topics
    text = "".join("\0" + document for document in topics.values())
    tokens = np.frombuffer(text.encode(), np.uint8)
    n_val = len(tokens) // 10
    parts = {"tiny_val_000000.bin": tokens[:n_val], "tiny_train_000001.bin": tokens[n_val:]}
    os.makedirs(folder, exist_ok=True)
    for name, part in parts.items():
        if not os.path.exists(os.path.join(folder, name)):
            write_shard(os.path.join(folder, name), part)


# ---- command line --------------------------------------------------------------------------------

def positive(text):
    """Convert the text of an option to an integer of at least 1."""
    with suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")


def parse_args():
    """Return the options, checked and with all defaults filled in."""
    parser = Parser(allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add = parser.add_argument
    add("--data_dir", default="fineweb10B", help="folder of the shards (default: %(default)s)")
    add("--dataset", help="dataset of the Hugging Face hub (default: HuggingFaceFW/fineweb, or "
        "kjj0/fineweb10B-gpt2 with --pretokenized)")
    add("--name", help="configuration of the dataset (sample-10BT for fineweb and fineweb-edu)")
    add("--split", default="train", help="split of the dataset (default: %(default)s)")
    add("--files", nargs="+", metavar="PATTERN", help="local files to read instead of a dataset: "
        "parquet, or jsonl, json and txt (plain, .gz, .xz or .zst); the files that match one "
        "pattern are read in sorted order")
    add("--pretokenized", action="store_true", help="download shards that others have published")
    add("--check", action="store_true", help="check the shards in data_dir and print a table")
    add("--max_tokens", type=positive, help="maximum number of tokens in all shards (default: all)")
    add("--shard_size", type=positive, default=10**8,
        help="tokens in a shard (default: %(default)s)")
    add("--val_tokens", type=positive, help="tokens in the validation shard (default: shard_size)")
    add("--num_proc", type=positive, default=cores, help="worker processes (default: %(default)s)")
    args = parser.parse_args()
    if args.files and (args.dataset or args.name or args.pretokenized):
        fail("--files excludes --dataset, --name and --pretokenized; choose one source")
    args.val_tokens = args.val_tokens or args.shard_size
    if max(args.val_tokens, args.shard_size) >= 2**31:
        fail("--shard_size and --val_tokens must be below 2147483648: a shard's header is int32")
    if args.max_tokens and args.max_tokens <= args.val_tokens and not args.pretokenized:
        fail(f"--max_tokens {args.max_tokens} must be above --val_tokens {args.val_tokens}, or no "
             "token is left to train on")
    default = "kjj0/fineweb10B-gpt2" if args.pretokenized else "HuggingFaceFW/fineweb"
    args.dataset = args.dataset or default
    if args.dataset in ("HuggingFaceFW/fineweb", "HuggingFaceFW/fineweb-edu"):
        args.name = args.name or "sample-10BT"
    return args


def main():
    args = parse_args()
    # hide the warnings of these packages: they say less than the message of `fail`
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    try:
        if args.check:
            sys.exit(check(args.data_dir))
        os.makedirs(args.data_dir, exist_ok=True)
        if args.pretokenized:
            return fetch_shards(args.data_dir, args.dataset, args.max_tokens)
        if args.files:
            source = Files(args.files)
        else:
            streaming = args.max_tokens is not None  # download only the text that is needed
            source = Hub(args.dataset, args.name, args.split, streaming, args.num_proc)
        make_shards(args.data_dir, source, args.shard_size, args.val_tokens, args.max_tokens,
                    args.num_proc)
    except OSError as e:  # disk full, no permission, ...
        fail(f"{args.data_dir}: {describe(e)}; solve the problem and start again to resume")
    except KeyboardInterrupt:
        fail("interrupted; start again with the same options to resume")


if __name__ == "__main__":
    main()
