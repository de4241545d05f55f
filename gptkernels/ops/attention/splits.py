"""How `attention_decode` cuts the keys of a batch entry into parts that run side by side.

The rule looks at nothing but the entry's own length, and at num_splits where it is given: so a
request gets the same bits alone and in any batch, at any place in it, whatever the cache could
hold. csrc/attention_decode_split.h and triton_kernels/attention_decode.py have the same rule for
lengths that only the GPU knows; the grid and the workspace come from the cache's capacity.
"""

from __future__ import annotations

# Keys that a part has at least where num_splits is not given, and the most parts there are then.
LEAST_KEYS, MOST_SPLITS = 256, 64
# A part given by num_splits is a multiple of this, which the tiles of every kernel divide.
ALIGNMENT = 64
# More parts than this change nothing: there are no 2**31 keys.
NUM_SPLITS_LIMIT = 2**25


def keys_per_split(length: int, num_splits: int) -> int:
    """Keys of each part, of the last one maybe fewer, for an entry of `length` keys; num_splits 0
    is none given."""
    if num_splits == 0:
        return LEAST_KEYS * max(1, _ceil(length, LEAST_KEYS * MOST_SPLITS))
    return ALIGNMENT * max(1, _ceil(_ceil(length, num_splits), ALIGNMENT))


def most_splits(capacity: int, num_splits: int) -> int:
    """The most parts that an entry of at most `capacity` keys has, at least 1."""
    if num_splits == 0:
        return max(1, min(MOST_SPLITS, _ceil(capacity, LEAST_KEYS)))
    return max(1, min(num_splits, _ceil(capacity, ALIGNMENT)))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
