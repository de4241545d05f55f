"""The blocks of a GPT on the newest tokens of each cached text, by one call of the CPU kernels
(csrc/cpu/decoder/params.h).

The layers make some ten calls a block, and what Python does between two of them takes longer than
most kernels do. That is why no table has a say here, which knows the ops alone. Results have the
same bits as the layers' by the CPU kernels. Nothing is kept from one call to the next: each looks
at all modules and parameters again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gptkernels.core.autocast import autocast_enabled
from gptkernels.core.choice import choose
from gptkernels.core.cpu import DTYPE_CODES, module
from gptkernels.core.direct import direct
from gptkernels.core.few_rows import MOST_ROWS
from gptkernels.nn.layers import MLP, CausalSelfAttention, KVCache, LayerNorm
from gptkernels.nn.plain import is_plain
from gptkernels.ops.attention.options import MAX_HEAD_DIM, bounds, scale
from gptkernels.ops.attention.plan import MOST_TOKENS


def cached_blocks(
    blocks: Iterable[nn.Module],
    ln_f: nn.Module | None,
    x: Tensor,
    caches: Sequence[KVCache],
    kind: type[nn.Module],
) -> Tensor | None:
    """Returns what the blocks, each of class `kind`, and GPT-2's ln_f make of x (R, T, C), whose
    keys and values go into the caches: those of row r to slot r, as `KVCache.places` says.

    Returns None where the layers have to be called: they are hooked or replaced, do not all run by
    the CPU kernels, something needs a gradient or watches PyTorch's calls, T is above MOST_TOKENS
    or R T above MOST_ROWS, or the layers would refuse something.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not direct((x,)):
        return None
    if autocast_enabled(x):
        return None
    try:
        call = _Call(x, caches)
        given = [
            call.block(block, cache, kind) for block, cache in zip(blocks, caches, strict=True)
        ]
        last = (0, 0, 0.0) if ln_f is None else call.norm(ln_f)
        positions, lengths = call.places()
    except _Unfit:
        return None
    if not direct(call.tensors):
        return None
    y = torch.empty_like(x)
    module().decoder_step(
        x.data_ptr(), y.data_ptr(), positions, lengths, call.sizes, scale(None, caches[0].k),
        ln_f is not None, last, DTYPE_CODES[x.dtype], given, torch.get_num_threads(),
    )  # fmt: skip
    return y


class _Unfit(Exception):
    """Something that the layers have to compute."""


class _Call:
    """Collects the arguments of a call. Each method raises _Unfit for what the call cannot take."""

    def __init__(self, x: Tensor, caches: Sequence[KVCache]) -> None:
        self._x, self._first = x, caches[0]
        self._impls: set[str] = set()
        self.tensors: list[Tensor] = []
        # Another class of caches may store something else.
        _need(all(type(cache) is KVCache for cache in caches) and caches[0].places is not None)
        _need(x.dim() == 3)
        R, T, C = x.shape
        _need(0 < T <= MOST_TOKENS and 0 < R * T <= MOST_ROWS)
        self._tensor(x, (R, T, C))
        _need(C > 0 and x.dtype in DTYPE_CODES and x.is_contiguous())
        _need(self._first.k.dim() == 4 and self._first.k.numel() > 0)
        Tmax, Hk, D = self._first.k.shape[1:]
        _need(D <= MAX_HEAD_DIM and C % D == 0 and C // D % Hk == 0)
        self.sizes = (R, T, Tmax, C, C // D, Hk, D)

    def block(
        self, block: Any, cache: KVCache, kind: type[nn.Module]
    ) -> tuple[tuple[int, ...], tuple[float, float]]:
        """The arguments of a block: addresses, strides and sizes; the eps of its norms."""
        R, _, Tmax, C, H, Hk, D = self.sizes
        _need(is_plain(block, kind))
        attn, mlp = block.attn, block.mlp
        _need(is_plain(attn, CausalSelfAttention) and is_plain(mlp, MLP))
        _need((attn.n_head, attn.n_kv_head, attn.head_dim) == (H, Hk, D) and H * D == C)
        _need(not (block.training and block.dropout))
        _need(mlp.approximate in ("tanh", "none") and is_plain(mlp.c_fc, nn.Linear))
        self._implementation(attn.impl)
        self._implementation(mlp.impl)
        first, second = self.norm(block.ln_1), self.norm(block.ln_2)
        F = mlp.c_fc.weight.shape[0]
        _need(F > 0)
        heads = (H + 2 * Hk) * D
        weights = (
            *self._linear(attn.c_attn, heads, C), *self._linear(attn.c_proj, C, C),
            *self._linear(mlp.c_fc, F, C), *self._linear(mlp.c_proj, C, F),
        )  # fmt: skip
        _need(cache.lengths is self._first.lengths and cache.places is not None)
        places, ours = self._first.places, cache.places
        _need(all(a is b for a, b in zip(places or (), ours or (), strict=True)))
        # PyTorch refuses to write to them, in the layers.
        fresh = cache.k.is_inference() or cache.v.is_inference()
        _need(torch.is_inference_mode_enabled() or not fresh)
        keys, values = (self._tensor(t, (R, Tmax, Hk, D)) for t in (cache.k, cache.v))
        _need(cache.k.is_contiguous() and cache.v.is_contiguous())
        left, _ = bounds(True, attn.window)
        numbers = (F, left, mlp.approximate == "tanh")
        return (*first[:2], *second[:2], *weights, keys, values, *numbers), (first[2], second[2])

    def norm(self, norm: Any) -> tuple[int, int, float]:
        """Addresses of weight and bias; eps."""
        C = self._x.shape[-1]
        _need(is_plain(norm, LayerNorm) and norm.weight is not None and norm.eps > 0)
        self._implementation(norm.impl)
        _need(norm.weight.is_contiguous() and (norm.bias is None or norm.bias.is_contiguous()))
        return self._tensor(norm.weight, (C,)), self._tensor(norm.bias, (C,)), norm.eps

    def places(self) -> tuple[int, int]:
        """Addresses of the tokens' positions, and of how many keys they see."""
        places, lengths = self._first.places, self._first.lengths
        assert places is not None
        (slots, positions), (R, T, Tmax) = places, self.sizes[:3]
        self.tensors += [slots, positions, lengths]
        _need(all(type(t) is Tensor for t in (slots, positions, lengths)))
        _need(slots.flatten().tolist() == list(range(R)))
        _need(positions.dtype == torch.int64 and lengths.dtype == torch.int32)
        _need(positions.shape == (R, T) and lengths.shape == (R,))
        _need(all(t.is_cpu and t.is_contiguous() for t in (positions, lengths)))
        _need(all(0 <= position < Tmax for position in positions.flatten().tolist()))
        _need(all(0 <= length <= Tmax for length in lengths.tolist()))
        return positions.data_ptr(), lengths.data_ptr()

    def _linear(self, layer: Any, N: int, K: int) -> tuple[int, int, int]:
        _need(is_plain(layer, nn.Linear))
        weight, bias = layer.weight, cast("Tensor | None", layer.bias)
        addresses = self._tensor(weight, (N, K)), self._tensor(bias, (N,))
        _need(weight.stride(1) == 1 and (bias is None or bias.is_contiguous()))
        return (*addresses, weight.stride(0))

    def _implementation(self, impl: str) -> None:
        if impl not in self._impls:
            _need(impl in ("auto", "cpu") and choose(impl, self._x) == "cpu")
            self._impls.add(impl)

    def _tensor(self, tensor: Tensor | None, shape: tuple[int, ...]) -> int:
        if tensor is None:
            return 0
        _need(type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided)
        _need(tensor.is_cpu and tensor.dtype == self._x.dtype and tensor.shape == shape)
        self.tensors.append(tensor)
        return tensor.data_ptr()


def _need(fits: Any) -> None:
    if not fits:
        raise _Unfit
