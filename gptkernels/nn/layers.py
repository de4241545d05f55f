"""Drop-in layers: nn.Modules over the fused ops, with the state_dict of what they replace.

    LayerNorm            weight, bias                       as nn.LayerNorm
    MLP                  c_fc, c_proj                       as nanoGPT's MLP
    CausalSelfAttention  c_attn, c_proj                     as nanoGPT's CausalSelfAttention

Each has an attribute `.impl`, "auto" unless set ("cuda", "triton", "cpu" and "torch" are the
others), which says which implementation of the op runs; `set_impl` sets it throughout a model. An
implementation that cannot run raises when it is used, and says why. Dropout acts in training mode
only.

Where a module inside is hooked, replaced or parametrised, it is called, so results and gradients
are those of plain PyTorch (`gptkernels.nn.plain`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, NoReturn, Self, TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from gptkernels.core.checks import check_count, check_positive, check_probability, check_tensor
from gptkernels.core.choice import check_impl
from gptkernels.core.keywords import check_keywords
from gptkernels.core.torchscript import refuse_script
from gptkernels.nn import elsewhere
from gptkernels.nn.linear import call_linear
from gptkernels.nn.plain import is_plain, not_plain_in, remember
from gptkernels.ops.attention.decode import attention_decode
from gptkernels.ops.attention.dense import attention
from gptkernels.ops.attention.options import MAX_HEAD_DIM, bounds
from gptkernels.ops.gelu_mlp.op import gelu_mlp
from gptkernels.ops.layer_norm.norm_linear import norm_linear
from gptkernels.ops.layer_norm.op import layer_norm

_Model = TypeVar("_Model", bound=nn.Module)


class FusedModule(nn.Module):
    """A module that computes one of the ops, by the implementation that `.impl` names.

    Raises TypeError for keywords that the constructor does not have, and names those it has.
    """

    _impl = "auto"
    # What is said of the keywords that other packages' constructors have.
    _elsewhere: ClassVar[Mapping[str, str]] = {}

    def __new__(cls, *given: Any, **named: Any) -> Self:
        """Looks at the keywords; no constructor has to."""
        check_keywords(cls, named, cls._elsewhere)
        return super().__new__(cls)

    def __prepare_scriptable__(self) -> NoReturn:
        """Raises NotImplementedError: there is no TorchScript of these layers."""
        refuse_script()

    @property
    def impl(self) -> str:
        """Which implementation runs; setting it sets that of fused modules inside too, setting an
        unknown one raises ValueError."""
        return self._impl

    @impl.setter
    def impl(self, impl: str) -> None:
        self._impl = check_impl(impl)
        for child in self.children():
            if isinstance(child, FusedModule):
                child.impl = impl


def set_impl(model: _Model, impl: str) -> _Model:
    """Set `.impl` of every fused layer inside `model`, and return `model`.

    Raises ValueError for an unknown implementation, and for a model without any fused layer.
    """
    check_impl(impl)
    layers = [module for module in model.modules() if isinstance(module, FusedModule)]
    if not layers:
        raise ValueError(
            f"model must contain a layer of gptkernels, got a {type(model).__name__} without one"
        )
    for layer in layers:
        layer.impl = impl
    return model


@remember
class LayerNorm(FusedModule, nn.LayerNorm):
    """nn.LayerNorm: the same constructor, parameters and results, and an instance of it. Dropout
    and residual add before it are in the same op.

    Parameters: weight and bias of normalized_shape, the last dimension or the last ones of x;
    without `bias` no bias, without `elementwise_affine` neither. Ba, Kiros, Hinton, "Layer
    Normalization", 2016. Raises TypeError and ValueError for sizes that are not counts, and
    ValueError for an eps that is not positive.
    """

    _elsewhere = elsewhere.LAYER_NORM

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive("eps", eps)
        given = normalized_shape
        sizes = given if isinstance(given, Sequence) else (given,)
        if not sizes:
            raise ValueError(f"normalized_shape must have at least one size, got {given!r}")
        shape = [check_count("normalized_shape", size) for size in sizes]
        super().__init__(shape, eps, elementwise_affine, bias, device, dtype)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        dropout_p: float = 0.0,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y = LN(s), s = dropout(x) + residual, all of one shape, (..., *normalized_shape).

        Returns y in x's dtype, or (y, s) with prenorm=True. s is fp32 if asked or if residual is,
        else in x's dtype. Without a residual s = dropout(x). Raises ValueError for an x of another
        shape; other errors are those of `gptkernels.layer_norm`.
        """
        result = layer_norm(
            self._rows("x", x),
            None if self.weight is None else self.weight.flatten(),
            None if self.bias is None else self.bias.flatten(),
            residual=None if residual is None else self._rows("residual", residual),
            dropout_p=dropout_p if self.training else 0.0,
            eps=self.eps,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            impl=self.impl,
        )
        if len(self.normalized_shape) == 1:
            return result
        if isinstance(result, Tensor):
            return result.view(x.shape)
        y, s = result
        return y.view(x.shape), s.view(x.shape)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Complete a layer that was pickled when it took one dimension only, or was no
        nn.LayerNorm."""
        super().__setstate__(state)
        if "normalized_shape" not in state:
            self.normalized_shape = tuple(self.weight.shape)
        self.elementwise_affine = self.weight is not None

    def _rows(self, name: str, x: Tensor) -> Tensor:
        """Returns x with one last dimension in place of the normalized ones."""
        check_tensor(name, x)
        shape = self.normalized_shape
        if tuple(x.shape[-len(shape) :]) != shape:
            sizes = ", ".join(map(str, shape))
            raise ValueError(f"{name} must have shape (..., {sizes}), got {tuple(x.shape)}")
        return x.flatten(-len(shape))

    def extra_repr(self) -> str:
        """What repr shows."""
        shape = self.normalized_shape
        return (
            f"{shape[0] if len(shape) == 1 else shape}, eps={self.eps}, "
            f"bias={self.bias is not None}, elementwise_affine={self.weight is not None}, "
            f"impl={self.impl!r}"
        )


class Normed(NamedTuple):
    """y = norm(s), as long as nobody changes y in place: then its version differs. Under
    torch.compile such a change is not noticed."""

    y: Tensor
    norm: nn.Module
    s: Tensor
    version: int


def add_norm(norm: nn.Module, branch: Tensor, stream: Tensor | None, dropout_p: float) -> Normed:
    """norm(s) for s = stream + dropout(branch), or dropout(branch) without a stream.

    This is one op where `norm` is plainly a LayerNorm of the last dimension. Any other norm is
    called with s, as in plain PyTorch.
    """
    if _is_plain_norm(norm):
        y, s = layer_norm(
            branch,
            norm.weight,
            norm.bias,
            residual=stream,
            dropout_p=dropout_p,
            eps=norm.eps,
            prenorm=True,
            impl=norm.impl,
        )
    else:
        s = F.dropout(branch, dropout_p)
        s = s if stream is None else stream + s
        y = norm(s)
    return Normed(y, norm, s, _version(y))


@remember
class MLP(FusedModule):
    """c_proj(gelu(c_fc(x))) as one op. Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016.

    Parameters: c_fc.weight (d_inner, d_model), c_fc.bias (d_inner,), c_proj.weight (d_model,
    d_inner), c_proj.bias (d_model,). With `.recompute` = True the backward pass computes the
    pre-activation again instead of keeping it. Where c_fc or c_proj is not a plain nn.Linear, both
    are called instead of the op, and `.recompute` has no effect: `not_fused` says why.
    """

    recompute = False

    _elsewhere = elsewhere.MLP

    def __init__(
        self,
        d_model: int,
        d_inner: int,
        bias: bool = True,
        approximate: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if approximate not in ("tanh", "none"):
            raise ValueError(f"approximate must be 'tanh' or 'none', got {approximate!r}")
        check_count("d_model", d_model)
        check_count("d_inner", d_inner)
        self.approximate = approximate
        self.c_fc = nn.Linear(d_model, d_inner, bias, device, dtype)
        self.c_proj = nn.Linear(d_inner, d_model, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_model) -> (..., d_model). Errors are those of `gptkernels.gelu_mlp`."""
        if not_plain_in(self, nn.Linear, "c_fc", "c_proj") is not None:
            return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))
        return gelu_mlp(
            x,
            self.c_fc.weight,
            self.c_fc.bias,
            self.c_proj.weight,
            self.c_proj.bias,
            approximate=self.approximate,
            recompute=self.recompute,
            impl=self.impl,
        )

    def not_fused(self) -> dict[str, str]:
        """What runs as PyTorch's own operators, and why: part -> reason."""
        reason = not_plain_in(self, nn.Linear, "c_fc", "c_proj")
        return {} if reason is None else {"mlp": reason}

    def extra_repr(self) -> str:
        """What repr shows."""
        return f"approximate={self.approximate!r}, impl={self.impl!r}"


@dataclass(frozen=True)
class KVCache:
    """Where an attention layer stores keys and values, and where it puts those of the next tokens.

    For inference alone: no gradient passes through a cache.
    `gptkernels.gpt.generation.cache.SlotCache` makes one for each layer; it allocates the buffers
    once and counts the tokens.

    Fields:
        k, v: (R, Tmax, Hk, D): what each of R slots has seen.
        places: where the next T tokens go: (R, 1) int64, the slots 0...R - 1, and (R, T) int64, the
            positions in them; None where they go to the start of their slot, and so see nothing
            but each other.
        lengths: (R,) int32: how many tokens each slot will hold with them.
    """

    k: Tensor
    v: Tensor
    places: tuple[Tensor, Tensor] | None
    lengths: Tensor

    def append(self, k: Tensor, v: Tensor) -> None:
        """Store k and v, (R, T, Hk, D), in place. Raises RuntimeError where they need a
        gradient."""
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise RuntimeError("a KVCache is for inference: call the model under torch.no_grad()")
        for cache, new in ((self.k, k), (self.v, v)):
            if self.places is None:
                cache[:, : new.shape[1]] = new
            else:
                cache[self.places] = new.to(cache.dtype)


@remember
class CausalSelfAttention(FusedModule):
    """Causal self-attention between two linear layers.

    Vaswani et al., "Attention Is All You Need", 2017.

    Parameters, D = d_model / n_head: c_attn.weight ((n_head + 2 n_kv_head) D, d_model), whose rows
    make all queries, then all keys, then all values; c_proj.weight (d_model, d_model); biases if
    `bias`. n_kv_head < n_head is grouped-query attention (Ainslie et al., 2023). `window` = (left,
    right) limits each token to so many neighbours, as in `gptkernels.attention`. `dropout` acts on
    the attention weights.

    Raises ValueError for widths that do not divide, D over 256, a dropout outside 0...1, or a
    window that is not a pair of bounds.
    """

    _elsewhere = elsewhere.CAUSAL_SELF_ATTENTION

    def __init__(
        self,
        d_model: int,
        n_head: int,
        n_kv_head: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        window: tuple[int, int] | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        n_kv_head = n_head if n_kv_head is None else n_kv_head
        self.head_dim = head_width("d_model", d_model, n_head)
        if n_head % check_count("n_kv_head", n_kv_head):
            raise ValueError(
                f"n_kv_head must divide n_head, got n_head={n_head} and n_kv_head={n_kv_head}"
            )
        check_probability("dropout", dropout)
        bounds(True, window)  # raises its errors now, not at the first call
        self.n_head, self.n_kv_head = n_head, n_kv_head
        self.dropout = dropout
        self.window = window
        made = (n_head + 2 * n_kv_head) * self.head_dim
        self.c_attn = nn.Linear(d_model, made, bias, device, dtype)
        self.c_proj = nn.Linear(d_model, d_model, bias, device, dtype)

    def forward(
        self,
        x: Tensor,
        cache: KVCache | None = None,
        *,
        normed: Normed | None = None,
    ) -> Tensor:
        """x (B, T, d_model) -> (B, T, d_model).

        With a cache, B is its number of slots: the keys and values of x are stored there, and each
        row of x sees what its slot holds. Raises TypeError or ValueError for another x, and what
        `KVCache.append`, `gptkernels.attention` and `gptkernels.attention_decode` raise.

        normed says what norm x is the output of: the backward pass then computes x again instead of
        keeping it. That has no effect where x is not normed.y as it was, or where c_attn or the
        norm is hooked or replaced.
        """
        check_tensor("x", x)
        d_model = self.n_head * self.head_dim
        if x.dim() != 3 or x.shape[-1] != d_model:
            raise ValueError(f"x must have shape (B, T, {d_model}), got {tuple(x.shape)}")
        heads = self._project(x, normed).unflatten(-1, (-1, self.head_dim))
        # Views: the op reads any strides whose last is 1, so nothing is copied or transposed.
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=-2)
        if cache is not None:
            cache.append(k, v)
        if cache is None or cache.places is None:
            out = attention(
                q,
                k,
                v,
                causal=True,
                window=self.window,
                dropout_p=self.dropout if self.training else 0.0,
                impl=self.impl,
            )
        else:
            out = attention_decode(
                q, cache.k, cache.v, cache.lengths, window=self.window, impl=self.impl
            )
        return call_linear(self.c_proj, cast("Tensor", out).flatten(-2), self.impl)

    def _project(self, x: Tensor, normed: Normed | None) -> Tensor:
        if normed is None or not torch.is_grad_enabled():
            return call_linear(self.c_attn, x, self.impl)
        y, norm, s, version = normed
        # A hook of this layer, or a module around it, may have replaced x or changed it in place.
        if x is not y or _version(y) != version:
            return self.c_attn(x)
        if not (is_plain(self.c_attn, nn.Linear) and _is_plain_norm(norm)) or norm.weight is None:
            return self.c_attn(x)
        return norm_linear(
            x,
            self.c_attn.weight,
            self.c_attn.bias,
            source=s,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            impl=norm.impl,
        )

    def extra_repr(self) -> str:
        """What repr shows."""
        return (
            f"n_head={self.n_head}, n_kv_head={self.n_kv_head}, dropout={self.dropout}, "
            f"window={self.window}, impl={self.impl!r}"
        )


def _is_plain_norm(norm: nn.Module) -> TypeGuard[LayerNorm]:
    """Whether `norm` is plainly a LayerNorm of the last dimension."""
    return is_plain(norm, LayerNorm) and len(norm.normalized_shape) == 1


def _version(y: Tensor) -> int:
    """How often y was changed in place. Always 0 without gradients, where it is not used, and under
    torch.compile, where it cannot be known."""
    return 0 if torch.compiler.is_compiling() or not torch.is_grad_enabled() else y._version


def head_width(name: str, width: int, n_head: int, n_head_name: str = "n_head") -> int:
    """The width of a head, width / n_head. The names are what errors call the two numbers.

    Raises TypeError and ValueError for numbers that are not counts, do not divide, or give a head
    that is too wide for attention.
    """
    check_count(name, width)
    check_count(n_head_name, n_head)
    if width % n_head:
        raise ValueError(
            f"{n_head_name} must divide {name}, got {name}={width} and {n_head_name}={n_head}"
        )
    if width // n_head > MAX_HEAD_DIM:
        raise ValueError(
            f"the head width {name} / {n_head_name} must be at most {MAX_HEAD_DIM}, "
            f"got {width} / {n_head} = {width // n_head}"
        )
    return width // n_head
