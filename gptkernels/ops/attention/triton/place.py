"""Finds the block, sequence and head that a program of the attention kernels works on.

Dense: every batch entry has T tokens, and its blocks follow each other.

VARLEN: sequences are packed end to end; sequence b has the tokens from cu_seqlens[b] to
cu_seqlens[b + 1] - 1. The blocks are numbered as if sequence b began at block
cu_seqlens[b] // BLOCK + b. These numbers never overlap, whatever the lengths, so a program finds
its sequence by bisection. The grid has few unused blocks, whether one sequence is long or all are
alike. The tokens before cu_seqlens[0] and from cu_seqlens[B] on count as two more sequences,
without any partners: their queries get the results of a row that sees no key, and their keys the
gradients of a key that no row sees.

The host does not read the lengths, so this function clamps them to the tensors' sizes.
"""

import triton
import triton.language as tl


@triton.jit
def place(
    cu_ptr,  # (B + 1,) int32, for the tokens that are cut into blocks; read when VARLEN
    other_cu_ptr,  # (B + 1,) int32, for the tokens that a program loops over; read when VARLEN
    T,
    other_T,
    heads,
    B,
    BLOCK: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """Returns (b, h, block, T, other_T, first, other_first): the program's batch entry b, head h
    and block; the numbers of tokens T and other_T of that entry; and the positions first and
    other_first of its first tokens among all tokens. b, h, first and other_first are int64.

    VARLEN: the arguments T and other_T are totals over all sequences. Some programs get a block
    past the last one and have nothing to do.
    """
    program = tl.program_id(0)
    if VARLEN:
        blocks = T // BLOCK + B + 2
        h, block = program // blocks, program % blocks
        # Number 0: the tokens before all sequences. 1 ... B: the sequences. B + 1: the tokens after
        # all sequences.
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
        # Clamp before subtracting: the difference of two arbitrary numbers may overflow.
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
