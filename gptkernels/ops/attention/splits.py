"""How `attention_decode` cuts the keys of a batch entry into splits, which run in parallel.

The rule depends only on the entry's own length, and on num_splits where it is given. So an entry
gets the same bits alone or in any batch, whatever the cache's capacity. The GPU alone knows the
lengths, so csrc/attention/decode/split.h and gptkernels/ops/attention/triton/decode.py repeat the
rule in the kernels; the grid and the workspace are sized for the cache's capacity.
"""

from __future__ import annotations

# Without num_splits: the fewest keys of a split, and the most splits of an entry.
LEAST_KEYS, MOST_SPLITS = 256, 64
# With num_splits: the keys of a split are a multiple of this number, which is a multiple of every
# kernel's tile.
ALIGNMENT = 64
# Asking for more splits than this changes nothing: an entry has fewer than 2**31 keys.
NUM_SPLITS_LIMIT = 2**25


def keys_per_split(length: int, num_splits: int) -> int:
    """Returns the number of keys of each split of an entry of `length` keys; the last split may
    have fewer. num_splits is 0 where the user gave none."""
    if num_splits == 0:
        return LEAST_KEYS * max(1, _ceil(length, LEAST_KEYS * MOST_SPLITS))
    return ALIGNMENT * max(1, _ceil(_ceil(length, num_splits), ALIGNMENT))


def most_splits(capacity: int, num_splits: int) -> int:
    """Returns the most splits that an entry of at most `capacity` keys can have, at least 1."""
    if num_splits == 0:
        return max(1, min(MOST_SPLITS, _ceil(capacity, LEAST_KEYS)))
    return max(1, min(num_splits, _ceil(capacity, ALIGNMENT)))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
