"""The libraries that `gptkernels prepare` could use, beside each other: quality and CPU time.

    pip install 'gptkernels[data]' datasketch trafilatura lxml_html_clean warcio
    git clone https://github.com/scrapinghub/article-extraction-benchmark
    python -m benchmarks.corpus_libraries article-extraction-benchmark TEXT [--json FILE]

The first argument is a folder with ground-truth.json (page -> articleBody) and html/<page>.html.gz,
the second a text of some 100,000 words or more, such as WikiText-2's validation part.

    main text   of these pages; precision and recall of 4-grams of words, as the benchmark's
                evaluate.py counts them, a page at a time
    WARC        an archive of these pages, its first half, and one with 40 wrong bytes inside:
                megabytes of HTML a second, and how many pages come out right and wrong
    MinHash     128 slots, of 5-grams of words of pieces of the text and edited copies: the root of
                the mean squared error of the estimated similarity, which theory puts at
                sqrt(J (1 - J) / 128), and signatures' 5-grams a second
    Bloom       rbloom's false positives of 10 million numbers, at a promise of 1e-4, and of 1e-8
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import random
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gptkernels.bench.environment import environment
from gptkernels.bench.results import write_json
from gptkernels.core.arguments import new_file
from gptkernels.gpt.corpus import sources
from gptkernels.gpt.corpus.decoding import decoded
from gptkernels.gpt.corpus.extract import extract
from gptkernels.gpt.corpus.records import Record

_SLOTS = 128
_PAIRS = 600
_NUMBERS = 1_000_000
_PROBES = 10_000_000

Row = dict[str, Any]


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("pages", type=Path, help="folder with ground-truth.json and html/")
    parser.add_argument("text", type=Path)
    parser.add_argument(
        "--json", type=new_file, metavar="FILE", help="also write the figures there"
    )
    options = parser.parse_args()
    truth = json.loads((options.pages / "ground-truth.json").read_text())
    pages = {
        name: gzip.decompress((options.pages / "html" / f"{name}.html.gz").read_bytes())
        for name in truth
    }
    texts = {name: fields["articleBody"] for name, fields in truth.items()}
    rows = []
    for row in (
        *_main_texts(pages, texts),
        *_archives(list(pages.values())),
        *_signatures(options.text.read_text(encoding="utf-8").split()),
        *_filters(),
    ):
        rows.append(row)
        print(", ".join(f"{key} {_said(value)}" for key, value in row.items()), flush=True)
    if options.json:
        names = (
            "resiliparse",
            "trafilatura",
            "fastwarc",
            "warcio",
            "rensa",
            "datasketch",
            "rbloom",
        )
        versions = {name: version(name) for name in names}
        write_json(
            options.json, {"environment": environment(), "libraries": versions, "rows": rows}
        )


def _said(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- main texts


def _main_texts(pages: dict[str, bytes], texts: dict[str, str]) -> Iterator[Row]:
    import trafilatura
    from resiliparse.extract.html2text import extract_plain_text

    def everything(page: bytes) -> str:
        return extract_plain_text(decoded(page, None) or "")

    ways: dict[str, Callable[[bytes], str]] = {
        "resiliparse, all text": everything,
        "resiliparse, as prepare": lambda page: str(extract(Record("", page))),
        "trafilatura, fast": lambda page: trafilatura.extract(page, fast=True) or "",
        "trafilatura": lambda page: trafilatura.extract(page) or "",
        "trafilatura, no comments": lambda page: (
            trafilatura.extract(page, include_comments=False) or ""
        ),
    }
    for way, function in ways.items():
        function(next(iter(pages.values())))  # what is imported or compiled at first
        begun = time.process_time()
        found = {name: function(page) for name, page in pages.items()}
        seconds = time.process_time() - begun
        scores = [_shared(texts[name], found[name]) for name in pages]
        precision, recall = (statistics.mean(score) for score in zip(*scores, strict=True))
        yield {
            "of": "main text",
            "library": way,
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall),
            "ms_per_page": 1e3 * seconds / len(pages),
        }


def _shared(true: str, found: str) -> tuple[float, float]:
    """Precision and recall of `found`, in 4-grams of words."""
    wanted, given = _shingles(true), _shingles(found)
    both = sum((wanted & given).values())
    return both / max(1, sum(given.values())), both / max(1, sum(wanted.values()))


def _shingles(text: str) -> Counter[tuple[str, ...]]:
    words = re.findall(r"\w+", text)
    return Counter(tuple(words[i : i + 4]) for i in range(max(1, len(words) - 3)))


# --- WARC


def _archives(pages: list[bytes]) -> Iterator[Row]:
    whole = _archive(pages)
    middle = len(_archive(pages[: len(pages) // 2])) + 400
    damaged = whole[:middle] + bytes(40) + whole[middle + 40 :]
    ways = {
        "fastwarc, as prepare": _by_prepare,
        "fastwarc, with its own gzip": _by_fastwarc,
        "warcio": _by_warcio,
    }
    for way, function in ways.items():
        row: Row = {"of": "WARC", "library": way, "pages": len(pages)}
        for name, archive in (("", whole), ("half_", whole[: len(whole) // 2]), ("bad_", damaged)):
            begun = time.process_time()
            found = list(function(archive))
            if not name:
                row["mb_per_s"] = sum(map(len, pages)) / 1e6 / (time.process_time() - begun)
            row[f"{name}right"] = sum(page in pages for page in found)
            row[f"{name}wrong"] = len(found) - row[f"{name}right"]
        yield row


def _archive(pages: list[bytes]) -> bytes:
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    out = io.BytesIO()
    writer = WARCWriter(out, gzip=True)
    for number, page in enumerate(pages):
        head = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.1")
        same = {"WARC-Record-ID": f"<urn:page:{number}>", "WARC-Date": "2000-01-01T00:00:00Z"}
        record = writer.create_warc_record(
            f"http://example.org/{number}",
            "response",
            payload=io.BytesIO(page),
            warc_headers_dict=same,
            http_headers=head,
        )
        writer.write_record(record)
    return out.getvalue()


def _by_prepare(archive: bytes) -> Iterator[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pages.warc.gz"
        file.write_bytes(archive)
        for record in sources.read(file):
            if isinstance(record, Record) and isinstance(record.content, bytes):
                yield record.content


def _by_fastwarc(archive: bytes) -> Iterator[bytes]:
    from fastwarc.warc import ArchiveIterator

    with contextlib.suppress(OSError):
        for record in ArchiveIterator(io.BytesIO(archive)):
            yield record.reader.read()


def _by_warcio(archive: bytes) -> Iterator[bytes]:
    from warcio.archiveiterator import ArchiveIterator

    with contextlib.suppress(Exception):  # its own, zlib's and others
        for record in ArchiveIterator(io.BytesIO(archive)):
            yield record.content_stream().read()


# --- MinHash


def _signatures(words: list[str]) -> Iterator[Row]:
    from datasketch import MinHash
    from rensa import CMinHash, RMinHash

    def datasketch(shingles: list[str]) -> MinHash:
        sketch = MinHash(num_perm=_SLOTS, seed=1)
        sketch.update_batch([shingle.encode() for shingle in shingles])
        return sketch

    def rensa(kind: Any) -> Callable[[list[str]], Any]:
        def sign(shingles: list[str]) -> Any:
            sketch = kind(num_perm=_SLOTS, seed=1)
            sketch.update(shingles)
            return sketch

        return sign

    pairs = list(_pairs(words))
    similar = [len({*a} & {*b}) / len({*a} | {*b}) for a, b in pairs]
    theory = statistics.mean(j * (1 - j) / _SLOTS for j in similar) ** 0.5
    ways = {
        "rensa, RMinHash": rensa(RMinHash),
        "rensa, CMinHash": rensa(CMinHash),
        "datasketch": datasketch,
    }
    for way, sign in ways.items():
        begun = time.process_time()
        signed = [(sign(a), sign(b)) for a, b in pairs]
        seconds = time.process_time() - begun
        errors = [a.jaccard(b) - j for (a, b), j in zip(signed, similar, strict=True)]
        yield {
            "of": "MinHash",
            "library": way,
            "error": statistics.mean(error**2 for error in errors) ** 0.5,
            "theory": theory,
            "bias": statistics.mean(errors),
            "shingles_per_s": sum(len(a) + len(b) for a, b in pairs) / seconds,
        }


def _pairs(words: list[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Of pieces of 60 to 1500 words, and of copies with up to 15% of their words replaced."""
    draw = random.Random(0)
    for _ in range(_PAIRS):
        length, rate = draw.choice((60, 150, 400, 1500)), draw.choice((0.005, 0.02, 0.05, 0.15))
        start = draw.randrange(len(words) - length)
        piece = words[start : start + length]
        edited = [draw.choice(words) if draw.random() < rate else word for word in piece]
        yield _fives(piece), _fives(edited)


def _fives(words: list[str]) -> list[str]:
    return [" ".join(words[i : i + 5]) for i in range(len(words) - 4)]


# --- Bloom filters


def _filters() -> Iterator[Row]:
    from rbloom import Bloom

    draw = random.Random(0)
    numbers = [draw.getrandbits(63) for _ in range(_NUMBERS)]
    for promised in (1e-4, 1e-8):
        bloom = Bloom(_NUMBERS, promised)
        begun = time.process_time()
        bloom.update(numbers)
        added = time.process_time() - begun
        yield {
            "of": "Bloom",
            "library": "rbloom",
            "promised": promised,
            "false_positives": sum(draw.getrandbits(63) in bloom for _ in range(_PROBES)) / _PROBES,
            "missing": sum(number not in bloom for number in numbers),
            "bits_per_number": bloom.size_in_bits / _NUMBERS,
            "ns_per_number": 1e9 * added / _NUMBERS,
        }


if __name__ == "__main__":
    main()
