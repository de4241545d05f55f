"""What an analysis has measured so far, in a JSON file that is replaced after each run.

    {"records": [{"task": ..., "seed": ..., "score": ...}, ...]}

A record begins with what decided it, the settings and digests of the model and the data, and goes
on with what was measured. An analysis that was interrupted finds there what it need not do again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptkernels.core.files import replacing
from gptkernels.gpt.finetuning.batches import Encoded
from gptkernels.gpt.weights import json_object

Record = dict[str, Any]


class Records:
    """The records in the file `path`, which need not be there yet.

    Raises ValueError for a file that no analysis wrote.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._all: list[Record] = []
        if path.exists():
            found = json_object(path).get("records")
            if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
                raise ValueError(f"{path} holds no records of an analysis, name another folder")
            self._all = found

    def find(self, settings: Record) -> Record | None:
        """The record that these settings decided."""
        wanted = _as_read(settings)
        for record in self._all:
            if all(record.get(name) == value for name, value in wanted.items()):
                return record
        return None

    def add(self, record: Record) -> Record:
        """Write `record` too, and return it as it will be read. Raises OSError."""
        self._all.append(_as_read(record))
        with replacing(self._path) as file:
            file.write_text(json.dumps({"records": self._all}, indent=2) + "\n", encoding="utf-8")
        return self._all[-1]


def digest_of_model(model: nn.Module) -> str:
    """A fingerprint of all parameters: names, shapes and bits."""
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(memoryview(tensor.contiguous().view(torch.uint8).numpy()))
    return sha.hexdigest()[:16]


def digest_of_examples(examples: Iterable[Encoded]) -> str:
    """A fingerprint of the tokens and the right answers, in their order."""
    sha = hashlib.sha256()
    for example in examples:
        sha.update(repr((example.rows, example.target)).encode())
    return sha.hexdigest()[:16]


def _as_read(record: Record) -> Record:
    """What JSON makes of it: lists of tuples, for one."""
    read: Record = json.loads(json.dumps(record))
    return read
