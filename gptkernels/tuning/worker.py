"""The child process that measures: an error that stays with a GPU, a crash or a call that never
ends costs it alone.

It reads one line of JSON from stdin:

    {"keys": [Key.as_dict(), ...], "refused": [{way: why}, ...], "seconds": of all, "threads": n}

and writes one line an event to stdout:

    {"event": "trying", "key": number, "way": name}   before anything of a way runs
    {"event": "entry", "key": number, "entry": Entry.as_dict()}
    {"event": "cannot", "key": number, "why": sentence}
    {"event": "done"}

Nothing else is written there: what a library prints goes to stderr.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from gptkernels.core.tuned import Key
from gptkernels.tuning.contest import Contest

Say = Callable[..., None]
# So many times an equal share of the time that is left: the largest classes come first.
_SHARES = 2.0


def main() -> None:
    """Does what stdin says."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**event: Any) -> None:
        print(json.dumps(event), file=channel, flush=True)

    given = json.loads(sys.stdin.readline())
    torch.set_num_threads(given["threads"])
    ends = time.monotonic() + given["seconds"]
    for number, (key, refused) in enumerate(zip(given["keys"], given["refused"], strict=True)):
        left = ends - time.monotonic()
        if left <= 0:
            break
        share = _SHARES * left / (len(given["keys"]) - number)
        _measure(number, Key.from_dict(key), refused, share, say)
        gc.collect()  # the tensors of a class are in cycles with its closures
    say(event="done")


def _measure(number: int, key: Key, refused: dict[str, str], seconds: float, say: Say) -> None:
    def trying(way: str) -> None:
        say(event="trying", key=number, way=way)

    try:
        entry = Contest(key, refused, trying, seconds).entry()
    except NotImplementedError as error:
        say(event="cannot", key=number, why=str(error))
    except torch.OutOfMemoryError:
        say(event="cannot", key=number, why="no memory is left for a call of its size")
    else:
        say(event="entry", key=number, entry=entry.as_dict())


if __name__ == "__main__":
    main()
