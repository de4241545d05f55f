"""The child process that measures: an error that stays with a GPU, a crash or a call that never
ends costs it alone.

It reads one line of JSON from stdin:

    {"keys": [Key.as_dict(), ...], "refused": [{way: why}, ...], "alone": [bool, ...],
     "seconds": of all,
     "threads": n, "device": index of a GPU or null, "precision": of fp32 products}

and writes one line an event to stdout:

    {"event": "trying", "key": number, "way": name}   before a way runs, "" before others
    {"event": "in turns", "key": number, "seconds": roughly}   before ways are timed in turns
    {"event": "entry", "key": number, "entry": Entry.as_dict()}
    {"event": "cannot", "key": number, "why": sentence}
    {"event": "done"}

Nothing else is written there: what a library prints goes to stderr. Where stdin ends, so does the
process: whoever wanted the answers has ended.
"""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from gptkernels.core.errors import in_a_line
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

    given = json.loads(_first_line())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    torch.set_num_threads(given["threads"])
    torch.set_float32_matmul_precision(given["precision"])
    if given["device"] is not None:
        torch.cuda.set_device(given["device"])
    ends = time.monotonic() + given["seconds"]
    classes = zip(given["keys"], given["refused"], given["alone"], strict=True)
    for number, (key, refused, alone) in enumerate(classes):
        left = ends - time.monotonic()
        if left <= 0:
            break
        share = _SHARES * left / (len(given["keys"]) - number)
        _measure(number, Key.from_dict(key), refused, alone, share, say)
        gc.collect()  # the tensors of a class are in cycles with its closures
    say(event="done")


def _first_line() -> bytes:
    """Of stdin, and no byte more: a buffer's lock would be held as the process ends."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line


def _end_with_stdin() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def _measure(
    number: int, key: Key, refused: dict[str, str], alone: bool, seconds: float, say: Say
) -> None:
    def trying(way: str) -> None:
        say(event="trying", key=number, way=way)

    def in_turns(seconds: float) -> None:
        say(event="in turns", key=number, seconds=seconds)

    try:
        entry = Contest(key, refused, trying, seconds, in_turns, alone).entry()
    except NotImplementedError as error:
        say(event="cannot", key=number, why=str(error))
    except torch.OutOfMemoryError:
        say(event="cannot", key=number, why="no memory is left for a call of its size")
    except Exception as error:  # in what makes or times the calls: other classes may be measured
        say(event="cannot", key=number, why=in_a_line(error))
    else:
        say(event="entry", key=number, entry=entry.as_dict())


if __name__ == "__main__":
    main()
