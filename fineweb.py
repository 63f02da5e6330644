"""
Turn text into shards of tokens, GPT-2's or your own. Run this once, before training.

    python fineweb.py                  # FineWeb sample-10BT to fineweb10B/: 10.3B tokens, 21 GB
    python fineweb.py --max_tokens 300000000  # a sample; downloads only the text that it needs
    python fineweb.py --pretokenized --max_tokens 1000000000  # published shards of the same data
    python fineweb.py --dataset HuggingFaceFW/fineweb-edu --name sample-10BT --data_dir edu10B
    python fineweb.py --dataset manu/project_gutenberg --split en --data_dir gutenberg
    python fineweb.py --files heldout.txt books/ --val_tokens 1000000 --data_dir mine
    python fineweb.py --files 'books/*.txt' wiki.jsonl.xz --val_tokens 1000000 --data_dir mine
    python fineweb.py --files books/ --vocab_size 8192 --val_tokens 1000000 --data_dir mine8k
    python fineweb.py --files more/ --vocab mine8k/vocab.tiktoken --data_dir more8k
    python fineweb.py --check          # look for damaged and missing shards

The program may be killed at any moment. Started again with the same options, it resumes after the
last finished shard. The bytes of the shards do not depend on interruptions or on --num_proc. Only
one process at a time may write to a folder.

With --vocab_size, the first --vocab_mb megabytes of the text are read beforehand to train a
vocabulary of that many tokens (257: none but bytes), which needs the package tokenizers. It is
written to vocab.tiktoken, from which the training scripts know what the tokens mean.

The documents form one sequence of tokens: <|endoftext|> (the last token; GPT-2's is 50256) stands
in front of each document, and blank documents are left out. The first val_tokens tokens become
fineweb_val_000000.bin. The rest becomes fineweb_train_000001.bin, fineweb_train_000002.bin, ... of
shard_size tokens each; a document may begin in one shard and end in the next. A shard has llm.c's
format: a header of 256 int32 (20240520, 1, number of tokens, zeros), then the tokens as uint16.
"""
import argparse
import base64
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import multiprocessing
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress

import numpy as np  # other packages are imported where used: each worker imports this file again

MAGIC, VERSION = 20240520, 1  # the first two numbers of a shard
HEADER_BYTES = 256 * 4


# ---- errors and files (all scripts use these) ----------------------------------------------------

def shorten(text, length):
    """Return a text as one line. If it is longer than `length`, cut it at a blank and add "..."."""
    line = " ".join(str(text).split())
    return line if len(line) <= length else line[:length].rsplit(" ", 1)[0] + " ..."


def fail(message):
    """End the program with exit code 1 and the message as one line on stderr."""
    sys.exit("error: " + shorten(message, 500))


def describe(error):
    """Return the type and the message of an exception."""
    return f"{type(error).__name__}: {shorten(error, 300)}"


@contextmanager
def explain(message, *errors):
    """Turn errors of the given types into one line: the message, then what the error says."""
    try:
        yield
    except errors as e:
        fail(f"{message}: {e}")


@contextmanager
def one_line_errors():
    """Turn I/O and out-of-memory errors, and Ctrl-C, into one line. Use it as a decorator."""
    try:
        yield
    except OSError as e:
        fail(e)
    except KeyboardInterrupt:
        fail("interrupted")
    except RuntimeError as e:  # PyTorch's words: the first for a GPU, the second for the CPU
        if "out of memory" not in str(e) and "can't allocate memory" not in str(e):
            raise
        fail("out of memory: lower --batch_size (the result is the same: gradients accumulate)")


class Parser(argparse.ArgumentParser):
    """A parser of options whose errors are one line."""

    def error(self, message):
        fail(f"{message} ({self.prog} --help lists the options)")


def boolean(text):
    """Return the value of an option that is true or false; argparse reports a ValueError."""
    if text.lower() not in ("0", "false", "no", "1", "true", "yes"):
        raise ValueError
    return text.lower() in ("1", "true", "yes")


@contextmanager
def replacing(path):
    """Open a temporary file beside path for writing; rename it to path once it is whole and on the
    disk; delete it after an error. Raise OSError, with the path, if it cannot be written."""
    # a name for this writer only: two processes, of two machines even, may write the same file
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        with suppress(OSError):
            os.unlink(temporary)
        wrapped = isinstance(e, RuntimeError) and isinstance(e.__context__, OSError)  # torch.save
        if isinstance(e, OSError) or wrapped:
            raise OSError(f"cannot write {path}: {e}; what was there before is untouched") from e
        raise


def lock_folder(folder, option):
    """Create a folder if need be and lock it for this process, as its only writer. End the program
    if another process holds the lock. Delete the temporary files of writers that were killed.

    folder: its path. option: the option that chose it, such as "--data_dir", for the message.
    Return the open lock file; the lock is held until it is closed or this process ends, however it
    ends. The file .lock stays, and says who held the lock last. Raise OSError if it cannot be
    written."""
    os.makedirs(folder, exist_ok=True)
    file = open(os.path.join(folder, ".lock"), "a+")
    # The kernel drops this lock with the process. On disks without such locks the package filelock
    # would leave a marker file, which after kill -9 someone must delete.
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # file systems differ in which they raise
        file.seek(0)
        holder = file.read() or "unknown"
        fail(f"another process writes to {folder}: {holder}; wait for it, or use another {option}")
    except (OSError, ModuleNotFoundError) as e:  # some network disks; Windows
        print(f"{folder} cannot be locked ({e}): take care that no other process writes to it",
              file=sys.stderr)
        return file
    file.truncate(0)
    file.write(f"PID {os.getpid()} on {socket.gethostname()}")
    file.flush()
    for path in glob.glob(os.path.join(glob.escape(folder), "*." + "[0-9a-f]" * 8 + ".tmp")):
        os.unlink(path)
    return file


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
        raise ValueError(f"not a token shard (it does not start with {MAGIC}, {VERSION})")
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
                fail(f"{self.paths[i]} holds token {piece.max()}, but the vocabulary has only "
                     f"{self.vocab_size}: see --vocab_size and {VOCAB_FILE}")
            tokens[filled:filled + len(piece)] = piece
            filled += len(piece)
        return tokens

    def first_bytes(self, n, tokenizer):
        """Return (number of targets, text) of the first n bytes, or of all if there are fewer. The
        first token is not a target, but at least one target is counted."""
        # a document of b bytes has at most b + 1 tokens, so n bytes have at most 2 n
        ids = self.read(0, min(2 * n, len(self)))
        ends = token_lengths(tokenizer)[ids].cumsum()
        text = tokenizer.decode_bytes(ids[ids != tokenizer.eot_token].tolist())
        return max(1, int(np.searchsorted(ends, n))), text[:n]


def splits_of(path):
    """Return the splits in the name of a shard, a list of "train" and "val". It should be one."""
    name = os.path.basename(path).lower()
    words = re.split("[^a-z]+", name)  # so that retrieval_train_000001.bin is a train shard
    return ([split for split in ("train", "val") if split in words]
            or [split for split in ("train", "val") if split in name])


def name_order(path):
    """Return the key that sorts shards by name, but train_9.bin before train_10.bin."""
    return re.sub(r"\d+(?=\D*$)", lambda number: number[0].zfill(20), os.path.basename(path))


def missing_shards(paths):
    """Return the gaps in the numbers of the shards of one split, as text: "" or "2, 3".
    Numbers start at 0 or 1. Names that differ in more than the number are counted apart."""
    series = {}  # the name up to the number -> the numbers
    for path in paths:
        if match := re.fullmatch(r"(.*?)(\d+)\.bin", path):
            series.setdefault(match[1], set()).add(int(match[2]))
    missing = (str(number) for numbers in series.values()
               for number in range(1, max(numbers)) if number not in numbers)
    first = list(itertools.islice(missing, 21))  # if names end in dates there are millions of gaps
    return ", ".join(first[:20] + ["..."] * (len(first) > 20))


def open_shards(data_dir, split, vocab_size):
    """Return the shards of a split, "train" or "val", in the order of their names."""
    paths, shards = [], []
    for path in sorted(glob.glob(os.path.join(glob.escape(data_dir), "*.bin")), key=name_order):
        splits = splits_of(path)
        if len(splits) == 2:
            fail(f"{path}: its name holds both train and val; rename it, or move it away")
        if splits == [split]:
            paths.append(path)
    if not paths:
        fail(f"no {split} shards (*{split}*.bin) in {data_dir}: make them with fineweb.py, or use "
             "--data_dir=DIR")
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
    paths = sorted(glob.glob(os.path.join(glob.escape(data_dir), "*.bin")), key=name_order)
    if not paths:
        fail(f"no shards (*.bin) in {data_dir}; give their folder with --data_dir")
    vocab = vocab_of(data_dir)
    eot = n_tokens(vocab) - 1  # <|endoftext|>
    names = {path: os.path.basename(path) for path in paths}
    paths.sort(key=lambda path: splits_of(path) != ["val"])  # validation first: False comes first
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
            documents = sum(np.count_nonzero(block == eot) for block in blocks)
            start = "a document" if tokens[0] == eot else "a remainder"
            if largest > eot:
                verdict = f"BAD: the token ids of the vocabulary end at {eot}"
            elif splits_of(path) == ["val"] and path == paths[0] and tokens[0] != eot:
                verdict = f"BAD: its first token is not {eot}"  # later shards may continue one
            elif len(splits_of(path)) != 1:
                verdict = "BAD: its name must hold train or val, and not both"
        except (OSError, ValueError) as e:
            verdict = f"BAD: {e}"
        total += count
        if verdict != "ok":
            bad += 1
        print(format_row(names[path], f"{count:,}", f"{documents:,}", largest, start, verdict))
    missing = []
    for split, first in ("val", "0"), ("train", "1"):
        of_split = [path for path in paths if splits_of(path) == [split]]
        gaps = missing_shards(of_split) if of_split else first
        missing += [f"{gaps} of {split}"] if gaps else []
    print(f"{len(paths)} shards, {total:,} tokens, {bad} bad"
          + (f", MISSING: {'; '.join(missing)}" if missing else ""))
    return 1 if bad or missing else 0


# ---- sources of text -----------------------------------------------------------------------------
# A source is an object with the attributes
#   id           the options that chose it, a dictionary for progress.json
#   read(start)  yields the documents from number `start` on: str, or None for an empty table cell
#   fraction     how much of the whole has been read, from 0 to 1; None if unknown
#   place(i)     says where document number i, which has been read, comes from
#   counts       number of documents of each file read to its end, to skip it later (Files only)

def text_column(names, where):
    """Return the name of the text column: text, or else the only one spelled like Text or TEXT."""
    exact = [name for name in names if name == "text"]
    found = exact or [name for name in names if name.lower() == "text"]
    if len(found) > 1:
        fail(f"{where}: {len(found)} text columns: {', '.join(found)}; name only one of them text")
    if not found:
        fail(f"{where}: no text column among: {', '.join(names)}; rename the right one to text")
    return found[0]


def holds_text(arrow_type):
    """Return whether the values of an Arrow type are strings or missing."""
    from pyarrow import types
    if types.is_dictionary(arrow_type):  # to_pylist decodes it
        arrow_type = arrow_type.value_type
    return (types.is_string(arrow_type) or types.is_large_string(arrow_type)
            or types.is_string_view(arrow_type) or types.is_null(arrow_type))


def column_texts(tables, where):
    """Yield the texts of Arrow tables of one column."""
    for table in tables:
        column = table.schema.field(0)
        if not holds_text(column.type):
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


def open_zst(raw):
    """Return the stream of the decompressed bytes of a stream in zstd's format.

    The decoder of pyarrow, which is always there, takes windows of up to 128 MB. Files written with
    zstd --long=31 have windows of 2 GB: these take Python 3.14 or the package backports.zstd."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        import pyarrow
        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    return zstd.open(raw, options={zstd.DecompressionParameter.window_log_max: 31})


def reraise(error):
    raise error


class Files:
    """Local files as a source of text."""
    file_type = re.compile(r"\.(parquet|(?:jsonl|json|txt)(?:\.(?:gz|xz|zst))?)$", re.IGNORECASE)

    def __init__(self, patterns):
        self.sizes = {}  # path -> bytes, in reading order; a file matched twice is read once
        for pattern in patterns:
            # the name of an existing file is no pattern, even if it contains [ or *
            matches = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
            if os.path.isdir(pattern):
                matches = self.in_folder(pattern)
            paths = [path for path in sorted(matches) if os.path.isfile(path)]
            if not paths:
                fail(f"--files {pattern}: no such file; check the name")
            for path in paths:
                if not self.file_type.search(path):
                    fail(f"--files {path}: unknown type of file; --help lists the known types")
                self.sizes[path] = os.path.getsize(path)
        self.id = {"files": [[os.path.basename(path), size] for path, size in self.sizes.items()]}
        self.counts, self.fraction = [], None

    def in_folder(self, folder):
        """Return the paths of all files of known types in a folder and below it, without hidden
        ones and progress.json. Print how many others there are; end if all are others."""
        paths = []
        with explain(f"--files {folder}", OSError):
            for parent, folders, names in os.walk(folder, onerror=reraise):
                folders[:] = [name for name in folders if not name.startswith(".")]
                paths += [os.path.join(parent, name) for name in names
                          if not name.startswith(".") and name != "progress.json"]
        known = [path for path in paths if self.file_type.search(path)]
        if not known:
            fail(f"--files {folder}: no file of a known type in this folder; --help lists them")
        if others := len(paths) - len(known):
            print(f"--files {folder}: {len(known)} files; {others} of other types are passed over")
        return known

    def read(self, start):
        total_bytes = max(1, sum(self.sizes.values()))  # all files may be empty
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
                    remedy = "repair it or leave it out"
                    if "too much memory" in str(e):  # zstd's words for a large window
                        remedy = ("pip install backports.zstd, or decompress it with zstd -d "
                                  "--long=31")
                    fail(f"{path}: cannot be read ({describe(e)}); {remedy}")
                if not known:
                    self.counts.append(count)
            start = max(0, start - self.counts[i])
            bytes_before += size

    def place(self, document):
        for path, count in itertools.zip_longest(self.sizes, self.counts):
            if count is None or document < count:  # None: not yet read to its end
                return f"{path} document {document + 1}"
            document -= count

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
            raw = open_zst(raw)
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

    def place(self, document):
        return f"{self.where} document {document + 1}"


# ---- vocabularies --------------------------------------------------------------------------------
# A folder of shards with vocab.tiktoken has that vocabulary, any other folder GPT-2's. The file has
# tiktoken's format: one token a line, its bytes in base64 and its id. <|endoftext|> is not in the
# file; its id follows the last. In the code `vocab` is the text of the file, "" for GPT-2's.

VOCAB_FILE = "vocab.tiktoken"
GPT2_TOKENS = 50257
# how bytes are spelled in tokenizer.json: each as a character that can be printed (openai/gpt-2,
# bytes_to_unicode in src/encoder.py)
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
SPELLING = ({byte: chr(byte) for byte in VISIBLE}
            | {byte: chr(256 + i) for i, byte in enumerate(HIDDEN)})
BYTES = [bytes([byte]) for byte in range(256)]  # the first tokens of a vocabulary that we train


def vocab_text(tokens):
    """Return tokens, a list of bytes in the order of their ids, as the text of vocab.tiktoken."""
    return "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))


def ranks_of(vocab):
    """Return the tokens of a vocabulary as {bytes: id}. vocab: the text of vocab.tiktoken.
    Raise ValueError, with the line, if it is no whole vocabulary."""
    ranks = {}
    for number, line in enumerate(vocab.splitlines()):
        token, _, rank = line.partition(" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"line {number + 1} is not a token in base64 and its id") from None
        if int(rank) != number or len(ranks) != number + 1:
            raise ValueError(f"line {number + 1} must have the id {number} and a new token")
    if missing := [token for token in BYTES if token not in ranks]:
        raise ValueError(f"{len(missing)} of the 256 bytes are no tokens of it")
    if len(ranks) >= 2**16:
        raise ValueError(f"{len(ranks)} tokens and <|endoftext|> do not fit the 16 bits of shards")
    return ranks


def read_vocab(path):
    """Return the vocabulary in a file. End the program if it is none."""
    with explain(f"{path} is no vocabulary", OSError, ValueError):
        with open(path, encoding="ascii") as file:
            vocab = file.read()
        ranks_of(vocab)
    return vocab


def vocab_of(data_dir):
    """Return the vocabulary of a folder of shards. End the program if it is not the one with which
    fineweb.py made the shards."""
    path = os.path.join(data_dir, VOCAB_FILE)
    vocab = read_vocab(path) if os.path.exists(path) else ""
    progress_path = os.path.join(data_dir, "progress.json")
    if os.path.exists(progress_path):
        damages = ValueError, RecursionError
        with explain(f"{progress_path} is damaged", *damages), open(progress_path) as file:
            progress = json.load(file)
        if isinstance(progress, dict) and progress.get("vocab", "") != digest(vocab):
            fail(f"{path} is missing, or is not the vocabulary of the shards beside it: restore it")
    return vocab


def digest(vocab):
    """Return the SHA-256 of a vocabulary, which names it; "" for GPT-2's."""
    return hashlib.sha256(vocab.encode()).hexdigest() if vocab else ""


def n_tokens(vocab):
    """Return the number of tokens of a vocabulary, with <|endoftext|>, which is the last."""
    return len(vocab.splitlines()) + 1 if vocab else GPT2_TOKENS


def padded_size(vocab):
    """Return the size of an embedding for a vocabulary: a multiple of 64, for speed."""
    return -(-n_tokens(vocab) // 64) * 64


def get_tokenizer(vocab, vocab_size):
    """Return the tokenizer of a vocabulary, a tiktoken.Encoding, for a model of vocab_size tokens.
    If there is none, say why and return None: GPT-2's needs a model of 50,257 tokens or more, and
    tiktoken must find it in its cache or download it. End if the model has too few tokens."""
    import tiktoken
    if vocab:
        from tiktoken_ext.openai_public import r50k_pat_str  # how GPT-2 cuts text into words
        if vocab_size < n_tokens(vocab):
            fail(f"--vocab_size={vocab_size} is less than the {n_tokens(vocab)} tokens of the data "
                 f"folder's {VOCAB_FILE}: leave the option out")
        return tiktoken.Encoding(VOCAB_FILE, pat_str=r50k_pat_str, mergeable_ranks=ranks_of(vocab),
                                 special_tokens={"<|endoftext|>": n_tokens(vocab) - 1})
    reason = (f"--vocab_size={vocab_size} is less than GPT-2's 50257, and the data folder has no "
              f"{VOCAB_FILE} that names its tokens")
    if vocab_size >= GPT2_TOKENS:
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as e:  # ValueError: something else came than was asked for
            reason = (f"GPT-2's BPE cannot be downloaded ({type(e).__name__}); set "
                      "TIKTOKEN_CACHE_DIR to a folder into which tiktoken has downloaded it before")
    if os.environ.get("RANK", "0") == "0":  # torchrun's processes would all say the same
        print("no tokenizer, so no samples, no HellaSwag and no bits per byte: " + reason,
              file=sys.stderr)
    return None


def token_lengths(tokenizer):
    """Return how many bytes of text each token stands for, int64 (n_vocab,); <|endoftext|> for 0.
    """
    tokens = (tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.n_vocab - 1))
    return np.array([len(token) for token in tokens] + [0])


def train_vocab(texts, vocab_size):
    """Return a vocabulary of vocab_size tokens, or fewer if the texts have not as many. They are
    GPT-2's kind of tokens: pairs of tokens that follow each other in a word become a token, the
    most frequent pair first (Sennrich et al., arXiv 1508.07909), and bytes are the first tokens."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        fail("--vocab_size needs the package tokenizers: pip install tokenizers")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's words
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet))
    byte_of = {character: byte for byte, character in SPELLING.items()}
    found = bpe.get_vocab()  # {token as it is spelled: its id}
    tokens = [bytes(byte_of[character] for character in token)
              for token in sorted(found, key=found.get)]
    return vocab_text(BYTES + [token for token in tokens if len(token) > 1])


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


def save_tokenizer(folder, tokenizer, block_size):
    """Write tokenizer.json and tokenizer_config.json, from which transformers makes a tokenizer
    with the ids of ours, a tiktoken.Encoding."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def spell(token):
        return "".join(SPELLING[byte] for byte in token)

    ranks = tokenizer._mergeable_ranks
    vocab = {spell(token): rank for token, rank in ranks.items()}
    merges = [(spell(a), spell(b)) for a, b in merges_of(ranks)]
    saved = Tokenizer(models.BPE(vocab, merges))
    # the text is split into words by GPT-2's pattern before bytes are merged
    saved.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    saved.decoder = decoders.ByteLevel()
    saved.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    saved.save(os.path.join(folder, "tokenizer.json"))
    # llama.cpp's converter recognises GPT-2's vocabulary by this name
    is_gpt2 = tokenizer.name == "gpt2"
    config = {"tokenizer_class": "GPT2Tokenizer" if is_gpt2 else "PreTrainedTokenizerFast",
              "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
              "model_max_length": block_size,
              "model_input_names": ["input_ids", "attention_mask"],
              "clean_up_tokenization_spaces": False}
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as file:
        json.dump(config, file, indent=1)


# ---- tokens --------------------------------------------------------------------------------------
# Worker processes tokenize lists of documents. The parent process keeps the lists in order.

def start_worker(vocab):
    """Load the tokenizer in a new worker, and make the worker end when the parent ends."""
    global encoding
    encoding = get_tokenizer(vocab, n_tokens(vocab))
    parent = multiprocessing.parent_process()

    def exit_after_parent():  # a parent killed by SIGKILL cannot stop its workers
        parent.join()
        os._exit(1)
    threading.Thread(target=exit_after_parent, daemon=True).start()


WHITE = r"[^\S\x1c-\x1f]"  # tiktoken's \s, which lacks four separators that Python's \s holds


def pieces_of(text, long=100_000):
    """Yield the pieces of a document, almost always one. Their tokens, one after the other, are the
    tokens of the document. long: the length of the runs of white space in which it is cut.

    tiktoken fails at a million blanks in front of a word. GPT-2 groups a run of blanks as one unit,
    except the last blank, which it joins to the word after it: so the text may be cut there."""
    start = 0
    if len(text) > long:
        for run in re.finditer(f"(?<!{WHITE}){WHITE}{{{long},}}", text):
            if run.end() < len(text):  # blanks at the end of the text are all one unit
                yield text[start:run.end() - 1]
                start = run.end() - 1
    yield text[start:]


class BadDocument(Exception):
    """A document that the tokenizer cannot take: its index in the list, and why."""


def tokenize(texts):
    """Return the tokens of all documents (uint16), and a list of the number of tokens of each.
    Each document counts with the <|endoftext|> before it; a blank document has 0 tokens."""
    parts = [np.zeros(0, np.uint16)]  # np.concatenate needs at least one array
    lengths = []
    for index, text in enumerate(texts):
        if not text or text.isspace():
            lengths.append(0)
            continue
        parts.append([encoding.eot_token])
        lengths.append(1)
        try:
            for piece in pieces_of(text):
                try:  # the same ids as encode_ordinary, in 5/6 of the time, a tenth of the memory
                    ids = encoding.encode_to_numpy(piece, disallowed_special=())
                except UnicodeEncodeError:  # a lone surrogate, "\ud800" in JSON, becomes U+FFFD
                    ids = encoding.encode_ordinary(piece)
                parts.append(ids)
                lengths[-1] += len(ids)
        except BaseException as e:  # a panic of tiktoken's Rust code is no Exception
            raise BadDocument(index, describe(e)) from None
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


def tokenized(source, start, vocab, num_proc):
    """Yield (tokens, lengths, fraction) for each batch of source.read(start), in order. The first
    two come from tokenize; fraction is source.fraction after the batch was read."""
    pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"),
                               initializer=start_worker, initargs=(vocab,))
    # workers inherit that SIGINT is ignored: Ctrl-C reaches all processes, only the parent reacts
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for _ in range(num_proc):
        pool.submit(int)  # a task that does nothing, but starts a worker if none is idle
    signal.signal(signal.SIGINT, handler)
    pending = deque()  # (future, fraction) of each batch that is with the workers
    document = start  # number of the first document of the first pending batch

    def wait_for_first():
        nonlocal document
        future, fraction = pending.popleft()
        tokens, lengths = future.result()
        document += len(lengths)
        return tokens, lengths, fraction

    try:
        for batch in batches(source.read(start)):
            pending.append((pool.submit(tokenize, batch), source.fraction))
            if len(pending) > 3 * num_proc:  # limits the memory if the workers are slow
                yield wait_for_first()
        while pending:
            yield wait_for_first()
    except BrokenProcessPool:
        fail("a worker died, perhaps for lack of memory; resume with a smaller --num_proc")
    except BadDocument as e:
        index, reason = e.args
        fail(f"{source.place(document + index)} cannot be tokenized ({reason}); leave it out")
    except Exception as e:
        fail(f"stopped at {source.place(document)} or soon after it ({describe(e)})")
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

@contextmanager
def writing_shards(data_dir):
    """Create and lock the folder of the shards. Remove it again if this try made it but no shard
    and no vocabulary, unless there are files in it from which a download resumes."""
    existed = os.path.isdir(data_dir)
    with lock_folder(data_dir, "--data_dir"):
        try:
            yield
        finally:
            made = os.listdir(data_dir)
            if not existed and not any(name.endswith((".bin", VOCAB_FILE)) for name in made):
                for name in ".lock", "progress.json":
                    with suppress(OSError):  # it is not there; Windows keeps the open .lock
                        os.unlink(os.path.join(data_dir, name))
                with suppress(OSError):  # it is not empty
                    os.rmdir(data_dir)


def save_progress(data_dir, progress):
    """Write progress.json."""
    with replacing(os.path.join(data_dir, "progress.json")) as f:
        f.write(json.dumps(progress).encode())


def load_progress(data_dir, options):
    """Return what is done in the folder and where the next shard starts. End the program rather
    than overwrite shards that were made with other options."""
    path = os.path.join(data_dir, "progress.json")
    fresh = {"options": options, "vocab": "", "shard": 0, "document": 0, "token": 0, "tokens": 0,
             "counts": [], "finished": False}
    if not os.path.exists(path):
        for name in "*.bin", VOCAB_FILE:
            if glob.glob(os.path.join(glob.escape(data_dir), name)):
                fail(f"{data_dir} has {name} but no progress.json; use another --data_dir")
        return fresh
    try:
        with open(path) as f:
            progress = {"vocab": ""} | json.load(f)  # before own vocabularies it had no "vocab"
        if any(type(progress[key]) is not type(value) for key, value in fresh.items()):
            raise TypeError
        numbers = [progress["shard"], progress["document"], progress["token"], progress["tokens"]]
        if any(type(n) is not int or n < 0 for n in numbers + progress["counts"]):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        fail(f"{path} is damaged; delete it and the shards beside it, or use another --data_dir")
    old_options, shards = progress["options"], progress["shard"]
    if old_options != options:
        if shards == 0:
            return fresh
        old = " ".join(f"--{name} {str(value)[:60]}" for name, value in old_options.items()
                       if value != options.get(name))
        fail(f"{data_dir} was begun with {old or 'GPT-2 tokens'}; use the same options, or another "
             "--data_dir")
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


def first_megabytes(source, megabytes):
    """Yield the documents of a source, and show progress, until they have so many megabytes."""
    from tqdm import tqdm
    total = megabytes * 10**6
    with tqdm(total=total, desc="reading text", unit="B", unit_scale=True) as bar:
        for text in source.read(0):
            data = (text or "").encode(errors="replace")  # a lone surrogate becomes "?"
            bar.update(len(data))
            yield data.decode()
            if bar.n >= total:
                break


def make_vocab(data_dir, source, progress, args):
    """Return the vocabulary that the options ask for. Write vocab.tiktoken, if it is not GPT-2's
    and not there from an earlier start, and its name into progress."""
    path = os.path.join(data_dir, VOCAB_FILE)
    if progress["vocab"] or progress["shard"]:
        return vocab_of(data_dir)
    if args.vocab_size == len(BYTES) + 1:
        vocab = vocab_text(BYTES)
    elif args.vocab_size:
        vocab = train_vocab(first_megabytes(source, args.vocab_mb), args.vocab_size)
        print(f"{path}: {n_tokens(vocab):,} tokens, trained on the first {args.vocab_mb} MB"
              + ("; the text has no more" if n_tokens(vocab) < args.vocab_size else ""))
    else:
        vocab = "" if args.vocab is None else read_vocab(args.vocab)
    if vocab:
        with replacing(path) as file:
            file.write(vocab.encode())
        progress["vocab"] = digest(vocab)
        save_progress(data_dir, progress)
    else:
        with suppress(FileNotFoundError):
            os.unlink(path)  # an earlier start with other options left it
    return vocab


def make_shards(data_dir, source, args):
    """Make the shards, or resume making them. args: see parse_args."""
    import tiktoken
    from tqdm import tqdm
    max_tokens = args.max_tokens
    options = {**source.id, "shard_size": args.shard_size, "val_tokens": args.val_tokens,
               "max_tokens": max_tokens}
    if args.vocab_size:
        options |= {"vocab_size": args.vocab_size, "vocab_mb": args.vocab_mb}
    if args.vocab is not None:
        options["vocab"] = digest(read_vocab(args.vocab))
    progress = load_progress(data_dir, options)
    shard, done = progress["shard"], progress["tokens"]
    if progress["finished"]:
        print(f"{data_dir}: finished before, {done:,} tokens in {shard} shards; nothing to do")
        return
    source.counts = progress["counts"]  # the same list, so what the source appends is saved
    save_progress(data_dir, progress)
    vocab = make_vocab(data_dir, source, progress, args)
    if not vocab:
        try:
            tiktoken.get_encoding("gpt2")  # download it to the cache, where the workers find it
        except Exception as e:
            fail(f"cannot load GPT-2's vocabulary ({describe(e)}); "
                 "connect to the network once, or set TIKTOKEN_CACHE_DIR to a copy")
    limit = max_tokens or sys.maxsize
    results = tokenized(source, progress["document"], vocab, args.num_proc)
    reader = TokenReader(results, progress["document"], progress["token"])
    with closing(results), tqdm(initial=done, total=max_tokens, unit="tok", unit_scale=True) as bar:
        unfinished = shard == 0 or reader.has_next()
        while unfinished:
            path = shard_path(data_dir, shard)
            size = args.val_tokens if shard == 0 else args.shard_size
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


def find_published(repo):
    """Return {local name: (split, published name, bytes)} of a repository's shards, validation
    first, and whether it has a vocabulary. Splits and numbers stay; a shard without a number gets
    the first, 0 for val, 1 for train."""
    from huggingface_hub import HfApi
    found, has_vocab = {}, False
    for entry in HfApi().list_repo_tree(repo, repo_type="dataset"):
        has_vocab = has_vocab or entry.path == VOCAB_FILE
        splits = splits_of(entry.path)
        if not entry.path.endswith(".bin") or not splits:
            continue
        if len(splits) == 2:
            fail(f"--dataset {repo}: the name {entry.path} holds both train and val")
        number = re.search(r"(\d+)\.bin$", entry.path)
        index = int(number[1]) if number else int(splits == ["train"])
        name = f"fineweb_{splits[0]}_{index:06d}.bin"
        if name in found:
            fail(f"--dataset {repo}: {found[name][1]} and {entry.path} would both become {name}")
        found[name] = splits[0], entry.path, entry.size
    order = sorted(found.items(), key=lambda item: (item[1][0] != "val", name_order(item[0])))
    return dict(order), has_vocab


def fetch_vocab(data_dir, repo, has_vocab):
    """Download a repository's vocabulary, if it has one. Without one its tokens are GPT-2's."""
    from huggingface_hub import hf_hub_download
    vocab = read_vocab(hf_hub_download(repo, VOCAB_FILE, repo_type="dataset")) if has_vocab else ""
    path = os.path.join(data_dir, VOCAB_FILE)
    has_files = any(name.endswith(".bin") or name == VOCAB_FILE for name in os.listdir(data_dir))
    if has_files and vocab != vocab_of(data_dir):
        fail(f"{data_dir} holds tokens of another vocabulary than {repo}: use another --data_dir")
    if vocab:
        with replacing(path) as file:
            file.write(vocab.encode())


def fetch_shards(data_dir, repo, max_tokens):
    """Download published shards, validation first, until there are max_tokens (None: all). Shards
    that are in the folder already are kept if they are whole."""
    from huggingface_hub import hf_hub_download
    if os.path.exists(os.path.join(data_dir, "progress.json")):
        fail(f"{data_dir} holds shards made here (progress.json); use another --data_dir")
    total = 0
    begun = set()  # splits of which there is a shard: each gets one, whatever max_tokens is
    try:
        published, has_vocab = find_published(repo)
        if not published:
            fail(f"--dataset {repo}: no shards (*_val_000000.bin, *_train_000001.bin, ...) in it")
        fetch_vocab(data_dir, repo, has_vocab)
        for local_name, (split, name, size) in published.items():
            if max_tokens and total >= max_tokens and split in begun:
                continue
            path = os.path.join(data_dir, local_name)
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
            begun.add(split)
            print(f"{path}: {'already here' if whole else 'downloaded'}, {total:,} tokens so far")
    except Exception as e:
        fail(f"--dataset {repo}: download stopped ({describe(e)}); start again to resume")


def write_builtin_text(folder):
    """Write shards of the Python reference manual, which every Python contains, unless they exist.
    The vocabulary is that of bytes."""
    from pydoc_data.topics import topics
    path = os.path.join(folder, VOCAB_FILE)
    if os.path.exists(path):  # it is written last
        return
    tokens = []
    for document in topics.values():
        tokens += [len(BYTES), *document.encode()]  # <|endoftext|> is the first token after them
    n_val = len(tokens) // 10
    write_shard(os.path.join(folder, "tiny_val_000000.bin"), tokens[:n_val])
    write_shard(os.path.join(folder, "tiny_train_000001.bin"), tokens[n_val:])
    with replacing(path) as file:
        file.write(vocab_text(BYTES).encode())


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
        "parquet, or jsonl, json and txt (plain, .gz, .xz or .zst); a folder means all of them in "
        "and below it; the files of one pattern or folder are read in sorted order")
    add("--pretokenized", action="store_true", help="download shards that others have published")
    add("--check", action="store_true", help="check the shards in data_dir and print a table")
    add("--vocab_size", type=positive, metavar="N", help="train a vocabulary of N tokens on the "
        "first --vocab_mb megabytes (default: GPT-2's 50257 tokens)")
    add("--vocab_mb", type=positive, default=300, metavar="N", help="megabytes of text, in whole "
        "documents, to train the vocabulary on (default: %(default)s)")
    add("--vocab", metavar="FILE", help="use this vocab.tiktoken instead of GPT-2's")
    add("--max_tokens", type=positive, help="maximum number of tokens in all shards (default: all)")
    add("--shard_size", type=positive, default=10**8,
        help="tokens in a shard (default: %(default)s)")
    add("--val_tokens", type=positive, help="tokens in the validation shard (default: shard_size)")
    add("--num_proc", type=positive, default=cores, help="worker processes (default: %(default)s)")
    args = parser.parse_args()
    if args.files and (args.dataset or args.name or args.pretokenized):
        fail("--files excludes --dataset, --name and --pretokenized; choose one source")
    if (args.vocab_size is not None) + (args.vocab is not None) + args.pretokenized > 1:
        fail("--vocab_size, --vocab and --pretokenized each choose a vocabulary; use one of them")
    if args.vocab_size and not len(BYTES) < args.vocab_size <= 2**16:
        fail(f"--vocab_size {args.vocab_size} must be from 257, the bytes and <|endoftext|>, to "
             "65536, as shards have 16 bits a token")
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
        with writing_shards(args.data_dir):
            if args.pretokenized:
                return fetch_shards(args.data_dir, args.dataset, args.max_tokens)
            if args.files:
                source = Files(args.files)
            else:
                streaming = args.max_tokens is not None  # download only the text that is needed
                source = Hub(args.dataset, args.name, args.split, streaming, args.num_proc)
            make_shards(args.data_dir, source, args)
    except OSError as e:  # disk full, no permission, ...
        fail(f"{args.data_dir}: {describe(e)}; solve the problem and start again to resume")
    except KeyboardInterrupt:
        fail("interrupted; start again with the same options to resume")


if __name__ == "__main__":
    main()
