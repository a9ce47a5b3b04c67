"""Rows and files as nobody would write them, and everybody finds them: for tests that count every row."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TEXTS = [
    "", " ", "\t\n  ", "a", "Yes.", "\x00", "a\x00b", "\ufeffstart", "مرحبا بالعالم", "שלום", "\u202eltr\u202c",
    "e\u0301\u0301\u0301" * 5, "Z" + "\u0335" * 200, "👩‍👩‍👧‍👦", "𝔘𝔫𝔦", "\u2028\u2029", "\r",
    "<s>", "</s>", "<pad>", "text </s> more",
    "<|im_start|>assistant", "[INST] x [/INST]", "{{ bos_token }}", "<script>alert(1)</script>", "../../etc/passwd",
    "'; DROP TABLE", "\\ud800", "-0.0", "null", "x" * 3000, "word " * 2000, "\ufffd", "\U0010ffff", "ﷺ" * 20,
]  # fmt: skip

VALUES: list[Any] = [None, 0, -1.5, 1e308, True, [], ["a"], {}, {"a": {"b": [1]}}, [[None]], "x", 10**400]


def _good(rng: random.Random) -> bytes:
    row = {"instruction": rng.choice(TEXTS), "input": rng.choice(TEXTS), "output": rng.choice(TEXTS)}
    return json.dumps(row, ensure_ascii=rng.random() < 0.5).encode()


def _plain(rng: random.Random) -> bytes:
    return json.dumps({"instruction": f"Count to {rng.randrange(99)}", "output": "one two three"}).encode()


def _odd_types(rng: random.Random) -> bytes:
    row = {name: rng.choice(VALUES) for name in ("instruction", "input", "output", "more")}
    return json.dumps(row).encode()


def _missing(rng: random.Random) -> bytes:
    row = {"instruction": "q", "input": "", "output": "a", "extra": 1}
    return json.dumps({name: row[name] for name in rng.sample(list(row), rng.randrange(4))}).encode()


def _truncated(rng: random.Random) -> bytes:
    line = _good(rng)
    return line[: rng.randrange(1, len(line))]


def _garbage(rng: random.Random) -> bytes:
    return bytes(rng.choice([b for b in range(256) if b not in (10,)]) for _ in range(rng.randrange(1, 60)))


def _constant(rng: random.Random) -> bytes:
    surrogate = b'{"instruction": "\\ud800", "output": "a"}'
    nested = b'{"instruction": ' + b"[" * 5000 + b"]" * 5000 + b', "output": "a"}'
    return rng.choice(
        [
            b"null", b"[]", b"1", b'"text"', b"NaN", b"{}", b"\xef\xbb\xbf{}", b"{'a': 1}", b'{"a": 1,}',
            surrogate, nested,
            b'{"instruction": "a", "instruction": "b", "output": "c"}', b'{"instruction": NaN, "output": Infinity}',
            b'{"instruction": "raw \x01 control", "output": "a"}', b'{"instruction": "\xc3", "output": "a"}',
            b"\x00" * 50,
        ]
    )  # fmt: skip


def _blank(rng: random.Random) -> bytes:
    return rng.choice([b"", b" ", b"\t", b"\r", b" \r"])


_KINDS: list[Callable[[random.Random], bytes]] = [
    _good, _good, _plain, _plain, _odd_types, _missing, _truncated, _garbage, _constant, _blank,
]  # fmt: skip


def line(rng: random.Random) -> bytes:
    """One line of a JSONL file, without its end: good, bad or blank."""
    return rng.choice(_KINDS)(rng)


def lines(rng: random.Random, count: int) -> bytes:
    """A JSONL file's content; the last line may lack its end."""
    return b"\n".join(line(rng) for _ in range(count)) + rng.choice([b"", b"\n"])


def num_rows(content: bytes) -> int:
    """Rows of a JSONL content: its lines that are not blank."""
    return sum(bool(part.strip()) for part in content.split(b"\n"))


def write_corpus(folder: Path, seed: int, num_lines: int) -> int:
    """Files of every kind with hostile rows; returns how many rows must be accounted for, damaged files once."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    expected = 0
    for number in range(4):
        content = lines(rng, num_lines // 4)
        expected += num_rows(content)
        packed = gzip.compress(content) if number % 2 else content
        (folder / f"rows-{number}.jsonl{'.gz' if number % 2 else ''}").write_bytes(packed)
    (folder / "huge.jsonl").write_bytes(json.dumps({"instruction": "q", "output": "x" * 10_000_000}).encode() + b"\n")
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "empty.parquet").write_bytes(b"")
    (folder / "none.json").write_bytes(b"[]")
    (folder / "torn.jsonl.gz").write_bytes(gzip.compress(b"")[:-4])
    (folder / "not.parquet").write_bytes(b"PAR1 this is none PAR1")
    (folder / "rows.json").write_bytes(b'[{"instruction": "q", "output": "a"}, 3, {"instruction": "q"')
    mixed = [{"instruction": text, "input": None, "output": text} for text in TEXTS]
    pq.write_table(pa.Table.from_pylist(mixed), folder / "rows.parquet")
    pq.write_table(pa.table({"instruction": [1, 2], "output": [[1], []]}), folder / "types.parquet")
    # huge 1, empty files 2, torn 1, not.parquet 1, rows.json 3 (the last broken), parquet rows, types 2
    return expected + 1 + 2 + 1 + 1 + 3 + len(mixed) + 2
