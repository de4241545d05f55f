"""A corpus with everything in it that `prepare` tells apart, which the tests of it share."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gptkernels.gpt.corpus.config import PrepareConfig
from gptkernels.gpt.corpus.work import Chunk, Outcome, Task, Worker

BYTES = PrepareConfig(tokenizer="bytes", shard_tokens=300)


class Inline:
    """Stands for Pool, without its processes."""

    def __init__(self, processes: int, task: Task) -> None:
        self.worker = Worker(task)

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *error: object) -> None:
        del self.worker

    def outcomes(self, chunks: Iterable[Chunk]) -> Iterator[list[Outcome]]:
        return ([self.worker.outcome(record) for record in chunk] for chunk in chunks)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def corpus(folder: Path, seed: int = 0, lines: int = 60) -> Path:
    """Lines with everything in them that `prepare` tells apart, and two long texts, in records of
    which some are too short."""
    draw = random.Random(seed)
    words = [f"w{i}" for i in range(500)]
    folder.mkdir()
    texts: list[str] = []
    with (folder / "b.jsonl").open("w") as file:
        for i in range(lines):
            text = " ".join(draw.choices(words, k=draw.randint(0, 40)))
            if texts and draw.random() < 0.3:
                text = draw.choice(texts)
                if draw.random() < 0.5:
                    text = text.upper() + " more"
            texts.append(text)
            line: dict[str, Any] = {"text": text}
            if draw.random() < 0.3:
                line["score"] = draw.randint(0, 6)
            broken = draw.random() < 0.1
            file.write(f"not JSON {i}\n" if broken else json.dumps(line) + "\n")
    (folder / "a.txt").write_text(" ".join(draw.choices(words, k=700)))
    (folder / "c").mkdir()
    (folder / "c" / "d.txt").write_text(" ".join(draw.choices(words, k=100)))
    (folder / "c" / "picture.png").write_bytes(b"no source")
    return folder
