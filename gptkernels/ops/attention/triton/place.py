"""Which block of which sequence and head a program of the attention kernels works on.

Dense: T tokens in each entry of a batch, blocks of an entry one after the other.

VARLEN: sequences laid end to end, sequence b from cu_seqlens[b] up to, not with, cu_seqlens[b + 1].
Their blocks are counted as if each began at block cu_seqlens[b] // BLOCK + b, which leaves room for
all of them whatever their lengths; so a program finds its sequence by bisection, and the grid is as
tight for one long sequence among short ones as for equal ones. The tokens before cu_seqlens[0] and
from cu_seqlens[B] on count as two sequences more, which have nothing to attend to or be seen by:
they get what a row without keys and a key without rows get.

Nobody has read the lengths on the host: whatever they hold, they are clamped to the tensors here.
"""

import triton
import triton.language as tl


@triton.jit
def place(
    cu_ptr,  # (B + 1,) int32 of the tokens that are cut into blocks, read when VARLEN
    other_cu_ptr,  # (B + 1,) int32 of those that pass by
    T,
    other_T,
    heads,
    B,
    BLOCK: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """(b, h, block, T, other_T, first, other_first): the program's entry of the batch, its head and
    block there, the tokens of that entry on either side, and the numbers of the first of them among
    all tokens; b, h and those numbers are int64.

    VARLEN: T and other_T come as those of all sequences, and some programs get a block past the
    last one, for which there is nothing to do.
    """
    program = tl.program_id(0)
    if VARLEN:
        blocks = T // BLOCK + B + 2
        h, block = program // blocks, program % blocks
        # What comes before the first sequence is number 0, the first is 1, what follows all B + 1.
        low, high = 0, B + 1
        start = 0
        while low < high:
            middle = (low + high + 1) // 2
            middle_start = tl.minimum(tl.maximum(tl.load(cu_ptr + middle - 1), 0), T)
            begins = middle_start // BLOCK + middle <= block
            start = tl.where(begins, middle_start, start)
            low = tl.where(begins, middle, low)
            high = tl.where(begins, high, middle - 1)
        end = tl.load(cu_ptr + low, mask=low <= B, other=T)
        real = (low > 0) & (low <= B)
        other_start = tl.load(other_cu_ptr + low - 1, mask=real, other=0)
        other_end = tl.load(other_cu_ptr + low, mask=real, other=0)
        other_start = tl.minimum(tl.maximum(other_start, 0), other_T)
        block -= start // BLOCK + low
        # Clamped before it is subtracted from: a difference of any two numbers may overflow.
        T = tl.maximum(tl.minimum(end, T), start) - start
        other_T = tl.maximum(tl.minimum(other_end, other_T), other_start) - other_start
        first, other_first = tl.cast(start, tl.int64), tl.cast(other_start, tl.int64)
        b, h = tl.cast(low - 1, tl.int64), tl.cast(h, tl.int64)
    else:
        blocks = tl.cdiv(T, BLOCK)
        bh, block = program // blocks, program % blocks
        b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
        first, other_first = b * T, b * other_T
    return b, h, block, T, other_T, first, other_first
