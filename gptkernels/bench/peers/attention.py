"""Peers of `gptkernels.attention`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptkernels.bench.peers import Function, Peers, Shape, flash, flex, sdpa, xformers_attention
from gptkernels.bench.peers.packages import installed, load, need_gpu, need_half
from gptkernels.truth import baseline


def peers(
    device: torch.device,
    dtype: torch.dtype,
    q_shape: Shape,
    k_shape: Shape,
    *,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | Sequence[float] | None = None,
    attn_mask: Tensor | None = None,
    backward: bool,
    repeated: bool = True,
) -> Peers:
    """Makers of functions of q (B, Tq, H, D), k and v (B, Tk, Hk, D), which return out (B, Tq, H,
    D). The options are those of `gptkernels.attention`; `backward`: whether out is differentiated,
    `repeated`: again and again behind one call."""
    if alibi_slopes is not None:
        alibi_slopes = torch.as_tensor(alibi_slopes, dtype=torch.float32, device=device)
    problem = _Problem(
        device,
        dtype,
        q_shape,
        k_shape,
        causal,
        window,
        softcap,
        alibi_slopes,
        attn_mask,
        backward,
        repeated,
    )
    backends = sdpa.peers(device, dtype, q_shape, k_shape, problem.sdpa, backward=backward)
    # A backward pass alone keeps its graph. This one's holds all scores, so it comes last: others
    # must find memory.
    math = {"SDPA math": backends.pop("SDPA math")}
    found: Peers = {
        **backends,
        "FlexAttention": problem.flex,
        "FlashAttention-2": functools.partial(problem.flash, "FlashAttention-2"),
        "FlashAttention-3": functools.partial(problem.flash, "FlashAttention-3"),
        "FlashAttention-4": functools.partial(problem.flash, "FlashAttention-4"),
        xformers_attention.NAME: problem.xformers,
        "TransformerEngine": problem.transformer_engine,
        **math,
    }
    return installed(found)


@dataclass(frozen=True)
class _Problem:
    device: torch.device
    dtype: torch.dtype
    q_shape: Shape
    k_shape: Shape
    causal: bool
    window: tuple[int, int] | None
    softcap: float
    alibi_slopes: Tensor | None
    attn_mask: Tensor | None
    backward: bool
    repeated: bool

    @property
    def square(self) -> bool:
        """Queries and keys are as many. The causal flags of others then say the same as ours."""
        return self.q_shape[1] == self.k_shape[1]

    @property
    def sides(self) -> tuple[int, int]:
        """How far a query sees to the left and to the right; -1: without end."""
        left, right = self.window or (-1, -1)
        return left, 0 if self.causal else right

    def refuse_mask(self, name: str) -> None:
        if self.attn_mask is not None:
            raise NotImplementedError(f"{name} takes no mask tensor")

    def refuse_softcap(self, name: str) -> None:
        if self.softcap > 0:
            raise NotImplementedError(f"{name} has no softcap")

    def refuse_alibi(self, name: str) -> None:
        if self.alibi_slopes is not None:
            raise NotImplementedError(f"{name} takes no ALiBi slopes")

    # ---- PyTorch

    def sdpa(self) -> tuple[Tensor | None, bool]:
        """All options as one mask, bool or added, or as SDPA's flag."""
        self.refuse_softcap("F.scaled_dot_product_attention")
        plain = self.window is None and self.attn_mask is None and self.alibi_slopes is None
        if self.causal and plain and self.square:
            return None, True
        Tq, Tk, mask = self.q_shape[1], self.k_shape[1], self.attn_mask
        seen = baseline.band_mask(self.device, Tq, Tk, causal=self.causal, window=self.window)
        added = None if mask is None or mask.dtype == torch.bool else mask
        if mask is not None and mask.dtype == torch.bool:
            seen = mask if seen is None else seen & mask
        if self.alibi_slopes is not None:
            queries = torch.arange(Tk - Tq, Tk, device=self.device)
            away = queries[:, None] - torch.arange(Tk, device=self.device)
            alibi = -self.alibi_slopes[:, None, None] * away.abs()
            added = alibi if added is None else added + alibi
        if added is not None:
            hidden = added if seen is None else added.masked_fill(~seen, float("-inf"))
            seen = hidden.to(self.dtype)
        if seen is not None and seen.dim() == 3:  # it takes two dimensions, or four
            seen = seen[None]
        return seen, False

    def flex(self) -> Function:
        self.refuse_mask("FlexAttention")  # it has functions for that, which read no tensor
        (left, right), shift = self.sides, self.k_shape[1] - self.q_shape[1]
        cap, slopes = self.softcap, self.alibi_slopes

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if left < 0:
                return j <= i + shift + right
            if right < 0:
                return j >= i + shift - left
            return (j >= i + shift - left) & (j <= i + shift + right)

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if cap > 0:
                s = cap * torch.tanh(s / cap)
            return s if slopes is None else s - slopes[h] * (i + shift - j).abs()

        return flex.function(
            self.device,
            self.q_shape,
            self.k_shape,
            seen=None if left < 0 and right < 0 else seen,
            score=None if cap == 0 and slopes is None else score,
            backward=self.backward,
        )

    # ---- packages

    def flash(self, name: str) -> Function:
        options: dict[str, Any] = {"causal": self.causal}
        if self.window is not None:
            endless = None if name == "FlashAttention-4" else -1
            options["window_size"] = tuple(endless if n < 0 else n for n in self.sides)
        if self.softcap > 0:
            options["softcap"] = self.softcap
        if self.alibi_slopes is not None:
            options["alibi_slopes"] = self.alibi_slopes
        made = flash.function(name, "flash_attn_func", self.device, self.dtype, **options)
        self.refuse_mask(name)
        return made

    def xformers(self) -> Function:
        name, (left, right) = xformers_attention.NAME, self.sides
        grouped = self.q_shape[2] != self.k_shape[2]
        biases = xformers_attention.biases(self.device, grouped=grouped, backward=self.backward)
        self.refuse_softcap(name)
        # These it takes as a tensor of biases, for the kernels of SDPA's efficient backend.
        self.refuse_mask(f"{name} beside SDPA efficient")
        self.refuse_alibi(f"{name} beside SDPA efficient")
        bias = None
        if left >= 0 and right == 0:
            lower = biases.LowerTriangularFromBottomRightMask()
            bias = lower.make_local_attention(left + 1)  # which counts the query's own key
        elif left >= 0 and right > 0:
            bias = biases.LocalAttentionFromBottomRightMask(left, right)
        elif left < 0 and right == 0:
            at_first = biases.LowerTriangularMask()
            bias = at_first if self.square else biases.LowerTriangularFromBottomRightMask()
        elif left >= 0 or right > 0:
            raise NotImplementedError(f"{name} has no window without end to one side")
        return xformers_attention.function(bias)

    def transformer_engine(self) -> Function:
        name = "TransformerEngine"
        module = load(name)
        need_gpu(self.device, name)
        need_half(self.dtype, f"{name}'s fused attention")
        self.refuse_softcap(name)
        self.refuse_mask(f"{name}'s fused attention")
        self.refuse_alibi(f"{name}'s fused attention")
        if self.backward and self.repeated:  # it lets go of what it saved
            raise NotImplementedError(f"{name}'s backward pass cannot be repeated, to be timed")
        H, D = self.q_shape[2:]
        causal = "causal" if self.square else "causal_bottom_right"
        attend = module.DotProductAttention(
            H,
            D,
            num_gqa_groups=self.k_shape[2],
            attention_dropout=0.0,
            qkv_format="bshd",
            attn_mask_type=causal if self.causal else "no_mask",
            window_size=self.sides,
        )
        return lambda *tensors: attend(*tensors).unflatten(2, (H, D))  # it joins the heads
