"""Attention of Hugging Face's transformers, by its own registries.

Importing this module registers "gptkernels" beside "sdpa" and "eager":

    import gptkernels.dropin.transformers
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="gptkernels")

`attention` is what a model then calls, `mask` says what it hides. Three older families (OpenAI-GPT,
GPT-Neo, GPT-J) do not look into the registries: `gptkernels.accelerate` swaps the method that
computes their attention. transformers 4.57 and 5 are supported.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gptkernels.core.autocast import autocast_dtype
from gptkernels.core.checks import DTYPES
from gptkernels.core.choice import choose
from gptkernels.dropin import measured
from gptkernels.dropin.probe import Probe
from gptkernels.dropin.swap import Fused, Match, dropout_p, with_mask
from gptkernels.nn.plain import class_name
from gptkernels.ops.attention import dense
from gptkernels.ops.attention.limits import KERNEL_HEAD_DIM

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # transformers 4
    _active_collector = None  # type: ignore[assignment]

NAME = "gptkernels"
# True inside a forward that was asked for attention's weights.
_WEIGHTS: ContextVar[bool] = ContextVar("gptkernels_weights", default=False)
# The configs that accelerated models have, perhaps together with others.
_ANNOUNCED: Any = WeakIdKeyDictionary()
# Masks, their versions, and whether they hide the future.
_LOOKED_AT: Any = WeakIdKeyDictionary()
# With fewer numbers in q, "sdpa" takes less time.
_LEAST_NUMBERS = 1 << 16
# Models that hand a mask to attention as it is; others may cut it.
_SHORT_MASKS = ("gpt2", "gpt_bigcode", "gpt_neox", "opt")
# What some models pass beside the tensors, and the package's attention does not have.
_LACKING = ("position_bias", "cache", "head_mask")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query (B, H, Tq, D), key (B, Hk, Tk, D) and value (B, Hk, Tk, Dv)
    -> out (B, Tq, H, Dv), and no weights. s_aux: gpt-oss's sinks (H,).

    attention_mask: None; a causal one of `mask`, (B,) int32, how many keys each text has, or
    (B, Tk) bool, which keys exist; or (B, 1 or H, Tq, Tk), bool or added to the scores, which says
    all that is hidden. In an accelerated model "sdpa", which ran there before, computes what this
    attention does not have. Raises NotImplementedError for such an argument anywhere else and
    wherever attention's weights are asked for, and what `gptkernels.attention` raises.
    """
    if others.get("output_attentions") or _weights_wanted():
        raise NotImplementedError(
            f"attn_implementation={NAME!r} has no output_attentions; use "
            "attn_implementation='eager'"
        )
    swap = getattr(type(module), "_gptkernels", None)
    impl = "auto" if swap is None else swap.impl
    causal = getattr(module, "is_causal", True) if is_causal is None else bool(is_causal)
    own = bool(softcap) or s_aux is not None  # what "sdpa" would leave out
    leaves = impl == "auto" and not own and _is_pytorchs(query)
    taken = None
    if leaves and measured.asked(query) and _lacking(query, key, value, {}) is None:
        taken = _taken(query, key, value, attention_mask, causal)
        q, k, v, seen, mask = taken
        named: Any = {"attn_mask": mask, "dropout_p": dropout, "softmax_scale": scaling}
        leaves = not measured.attention(q, k, v, **seen, **named)
    reason = None if leaves and swap is not None else _lacking(query, key, value, others)
    elsewhere = s_aux is None and (swap is not None or _config_of(module) in _ANNOUNCED)
    if reason is not None and not elsewhere:
        raise NotImplementedError(f"attn_implementation={NAME!r} {reason}")
    if leaves or reason is not None:
        return sdpa_attention_forward(
            module, query, key, value, _for_sdpa(attention_mask, query, key), dropout=dropout,
            scaling=scaling, is_causal=is_causal, softcap=softcap, **others,
        )  # fmt: skip
    q, k, v, seen, mask = taken or _taken(query, key, value, attention_mask, causal)
    out = dense.attention(
        q, k, v, **seen, attn_mask=mask, dropout_p=dropout, softmax_scale=scaling,
        softcap=softcap or 0.0, sinks=s_aux, impl=with_mask(impl, mask),
    )  # fmt: skip
    return cast("Tensor", out), None


def _taken(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any], Tensor | None]:
    """q, k and v as the op takes them, (B, T, H, D), and what `_seen` says."""
    Tq = query.shape[2]
    if mask is None and causal and Tq > 1:
        # A static cache has more places than keys so far. The first texts fill its beginning.
        key, value = key[:, :, :Tq], value[:, :, :Tq]
    dtype = autocast_dtype(query)  # rotary embeddings leave q and k wide
    q, k, v = (_dense(x.to(dtype)).transpose(1, 2) for x in (query, key, value))
    return q, k, v, *_seen(mask, k, causal)


def _lacking(query: Tensor, key: Tensor, value: Tensor, others: dict[str, Any]) -> str | None:
    """What a call has that the package's attention has not; None where that is nothing."""
    for name in _LACKING:
        if others.get(name) is not None:
            return f"has no {name}; use attn_implementation='eager'"
    widest = max(query.shape[-1], value.shape[-1])
    if widest > KERNEL_HEAD_DIM:
        return f"has heads of up to {KERNEL_HEAD_DIM}, got {widest}; use attn_implementation='sdpa'"
    if query.shape[0] != key.shape[0] or query.dtype not in DTYPES:
        return "has q, k and v of one batch in float32, bfloat16 or float16"
    return None


def _config_of(module: Any) -> Any:
    return getattr(module, "config", module)


def _weights_wanted() -> bool:
    """Whether the caller collects attention's weights, of which this attention has none."""
    if not torch.compiler.is_compiling() and _WEIGHTS.get():
        return True
    collected = None if _active_collector is None else _active_collector.get()
    return collected is not None and any("attentions" in name for name in collected)


def _seen(mask: Tensor | None, k: Tensor, causal: bool) -> tuple[dict[str, Any], Tensor | None]:
    """What a mask of `attention` says, as arguments of the op, and the mask that is left."""
    lengths = None
    if mask is not None:
        causal = mask.dim() < 4
        if mask.dim() == 1:
            lengths, mask = mask, None
        else:
            mask = mask[:, None, None] if causal else mask[..., : k.shape[1]]
    return {"causal": causal, "key_lengths": lengths}, mask


def _is_pytorchs(query: Tensor) -> bool:
    """Whether impl="auto" leaves a call to "sdpa": where no kernel was measured to be faster, and
    for few numbers and a single new token, where PyTorch's was (docs/dropin.md)."""
    if torch.compiler.is_compiling():  # a question about sizes would be one that the graph asks
        return True
    few = query.shape[2] == 1 or query.numel() < _LEAST_NUMBERS
    return few or choose("auto", query) == "torch"


def _dense(x: Tensor) -> Tensor:
    """x with a last stride of 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _for_sdpa(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask in a form that "sdpa" takes."""
    if mask is None or mask.dim() == 4:
        return mask
    Tq, Tk = query.shape[2], key.shape[2]
    places = torch.arange(Tk, device=mask.device)
    there = places < mask[:, None] if mask.dim() == 1 else mask
    return there[:, None, None] & (places <= places[Tk - Tq :, None])


def mask(**given: Any) -> Tensor | None:
    """What transformers asks for a mask with: None where the causal one is all; how many keys each
    text has, (B,) int32, where they are padded on the right; which keys exist, (B, Tk) bool, where
    they are padded elsewhere; and for all others the mask of "sdpa"."""
    padding = given.get("attention_mask")
    if (
        padding is None
        or padding.dim() != 2
        or getattr(given.get("config"), "model_type", "") not in _SHORT_MASKS
        or torch.compiler.is_compiling()
        or padding.device.type != "cpu"
        or given.get("mask_function", causal_mask_function) is not causal_mask_function
        or given.get("local_size") is not None
        or not given.get("allow_is_causal_skip", True)
        or given.get("kv_offset", 0)
        or not _at_the_end(given, padding.shape[1])
    ):
        return sdpa_mask(**given)
    padding = padding.bool()
    lengths = padding.sum(-1, dtype=torch.int32)
    if bool((lengths == padding.shape[1]).all()):
        return sdpa_mask(**given)
    there = torch.arange(padding.shape[1]) < lengths[:, None]
    if torch.equal(there, padding):
        return lengths
    return padding


def _at_the_end(given: dict[str, Any], known: int) -> bool:
    """Whether the queries are the last of the keys, as the package's attention has them, and the
    padding says of each key whether it exists."""
    if "q_length" in given:
        count, first = given["q_length"], given.get("q_offset", 0)
    else:  # transformers 4.57
        positions = given["cache_position"]
        count, first = len(positions), int(positions[0])
    return bool(count + first == given["kv_length"] == known)


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)


class _Attention(Fused):
    """An attention that notices when its weights are asked for."""

    def forward(self, *given: Any, **options: Any) -> Any:
        """As the original's."""
        if not options.get("output_attentions"):
            return super().forward(*given, **options)
        token = _WEIGHTS.set(True)
        try:
            return super().forward(*given, **options)
        finally:
            _WEIGHTS.reset(token)


class Registered(_Attention):
    """An attention that calls what its config's `_attn_implementation` names."""

    what = "attention by attn_implementation='gptkernels'"


class _OwnMethod(_Attention):
    """An attention that computes itself, in a method `_attn` of q, k, v and masks."""

    what = "attention as one op"

    def _fits(self, q: Tensor, head_mask: Tensor | None) -> float | None:
        """The probability of dropout where the op takes the call; None where the original does."""
        if (self._gptkernels.impl == "auto" and _is_pytorchs(q)) or head_mask is not None:
            return None
        if _weights_wanted() or not self.fuses(q) or q.shape[-1] > KERNEL_HEAD_DIM:
            return None
        return dropout_p(self.attn_dropout)

    def _run(
        self, heads: tuple[Tensor, ...], mask: Tensor | None, scale: float, p: float,
        causal: bool = True, window: int = -1,
    ) -> Tensor:  # fmt: skip
        """Heads first in, heads first out. p: of dropout."""
        q, k, v = (_dense(x).transpose(1, 2) for x in heads)
        mask = None if mask is None else mask[..., : k.shape[1]].to(q.dtype)
        out = dense.attention(
            q, k, v, causal=causal, window=(window, -1), attn_mask=mask, dropout_p=p,
            softmax_scale=scale, impl=with_mask(self._gptkernels.impl, mask),
        )  # fmt: skip
        return cast("Tensor", out).transpose(1, 2)


class OpenAIAttention(_OwnMethod):
    """transformers' OpenAI-GPT. k comes transposed, and the result in a list."""

    def _attn(
        self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None, *more: Any
    ) -> list[Any]:
        # transformers 4 has a head_mask before output_attentions.
        head_mask = more[0] if len(more) > 1 else None
        p = None if more and more[-1] else self._fits(q, head_mask)
        if p is None:
            return super()._attn(q, k, v, attention_mask, *more)  # type: ignore[misc]
        scale = v.shape[-1] ** -0.5 if self.scale else 1.0
        return [self._run((q, k.transpose(2, 3), v), attention_mask, scale, p)]


class GPTNeoAttention(_OwnMethod):
    """transformers' GPT-Neo: scores are not scaled; every other layer sees a window."""

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
        *more: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        p = self._fits(query, more[0] if more else None)
        if p is None:
            return super()._attn(query, key, value, attention_mask, *more)  # type: ignore[misc]
        local = self.config.attention_layers[self.layer_id] == "local"
        window = self.config.window_size - 1 if local else -1
        heads = (query, key, value)
        return self._run(heads, attention_mask, 1.0, p, window=window), None


class GPTJAttention(_OwnMethod):
    """transformers' GPT-J."""

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
        *more: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        p = self._fits(query, more[0] if more else None)
        if p is None:
            return super()._attn(query, key, value, attention_mask, *more)  # type: ignore[misc]
        # The mask says what is hidden; where it hides the future, that need not be read.
        causal = attention_mask is not None and _hides_the_future(attention_mask, key.shape[2])
        heads, scale = (query, key, value), 1 / float(self.scale_attn)
        return self._run(heads, attention_mask, scale, p, causal), None


def _hides_the_future(mask: Tensor, keys: int) -> bool:
    """Whether an added mask of as many queries as keys hides all that follows. Looked at once, for
    all layers that get it, and on a CPU."""
    if torch.compiler.is_compiling() or not mask.is_cpu or mask.shape[-2] != keys:
        return False
    version = 0 if mask.is_inference() else mask._version
    known = _LOOKED_AT.get(mask)
    if known is None or known[0] != version:
        lowest = torch.finfo(mask.dtype).min
        future = torch.ones(keys, keys, dtype=torch.bool).triu(1)
        hidden = bool(((mask[..., :keys] <= lowest) | ~future).all())
        _LOOKED_AT[mask] = known = (version, hidden)
    return bool(known[1])


_BY_METHOD = {
    "transformers.models.openai.modeling_openai.Attention": OpenAIAttention,
    "transformers.models.gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention": GPTNeoAttention,
    "transformers.models.gptj.modeling_gptj.GPTJAttention": GPTJAttention,
}


def match(module: nn.Module, probe: Probe) -> Match:
    """The kind and its facts; or why the module is left alone; None where it is no attention of
    transformers."""
    kind = _BY_METHOD.get(class_name(module))
    if kind is not None:
        return kind, {}
    config = getattr(module, "config", None)
    forward = inspect.unwrap(type(module).forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    if config is None or "ALL_ATTENTION_FUNCTIONS" not in names:
        return None
    # What "sdpa" may be asked for, and what it is told, this attention understands. A model that
    # runs by another may have no such contract.
    running = config._attn_implementation
    if running not in ("sdpa", NAME):
        return f"runs attn_implementation={running!r}, not 'sdpa'"
    return Registered, {"before": running}


def announce(module: Any, accelerated: bool) -> None:
    """Writes to the config that an attention of transformers reads which one is to run; without
    `accelerated` what ran before, unless somebody has chosen another one since."""
    if accelerated:
        _ANNOUNCED[module.config] = True
        module.config._attn_implementation_internal = NAME
    elif module.config._attn_implementation == NAME:
        module.config._attn_implementation_internal = type(module)._gptkernels.before
