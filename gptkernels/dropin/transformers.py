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
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gptkernels.core.choice import choose
from gptkernels.dropin.swap import Fused, Match, with_mask
from gptkernels.nn.plain import class_name
from gptkernels.ops.attention import dense
from gptkernels.ops.attention.options import MAX_HEAD_DIM

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # transformers 4
    _active_collector = None  # type: ignore[assignment]

NAME = "gptkernels"
# True inside a forward that was asked for attention's weights.
_WEIGHTS: ContextVar[bool] = ContextVar("gptkernels_weights", default=False)
# With fewer numbers in q, "sdpa" takes less time.
_LEAST_NUMBERS = 1 << 16
# What some models pass beside the tensors, and the package's attention does not have.
_REFUSED = ("s_aux", "position_bias", "cache", "head_mask", "output_attentions")


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
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query (B, H, Tq, D), key and value (B, Hk, Tk, D) -> out
    (B, Tq, H, D), and no weights.

    attention_mask: None; a causal one of `mask`, (B,) int32, how many keys each text has, or
    (B, Tk) bool, which keys exist; or (B, 1 or H, Tq, Tk), bool or added to the scores, which says
    all that is hidden.
    `module.impl` names the implementation, where there is one. Raises NotImplementedError for an
    argument that the package's attention has not, and what `gptkernels.attention` raises.
    """
    if _weights_wanted():
        others["output_attentions"] = True
    for name in _REFUSED:
        if others.get(name) is not None and others[name] is not False:
            raise NotImplementedError(
                f"attn_implementation={NAME!r} has no {name}; use attn_implementation='eager'"
            )
    if query.shape[-1] > MAX_HEAD_DIM or key.shape != value.shape:
        raise NotImplementedError(
            f"attn_implementation={NAME!r} has heads of up to {MAX_HEAD_DIM} and values as wide as "
            f"keys, got {query.shape[-1]} and {value.shape[-1]}; use attn_implementation='sdpa'"
        )
    impl = getattr(module, "impl", "auto")
    if impl == "auto" and not softcap and _is_pytorchs(query, attention_mask):
        found, _ = sdpa_attention_forward(
            module, query, key, value, _for_sdpa(attention_mask, key.shape[2]), dropout=dropout,
            scaling=scaling, is_causal=is_causal, **others,
        )  # fmt: skip
        return found, None
    causal = getattr(module, "is_causal", True) if is_causal is None else bool(is_causal)
    Tq = query.shape[2]
    if attention_mask is None and causal and Tq > 1:
        # A static cache has more places than keys so far. The first texts fill its beginning.
        key, value = key[:, :, :Tq], value[:, :, :Tq]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = _attend(
        q, k, v, attention_mask, causal=causal, dropout_p=dropout, softmax_scale=scaling,
        softcap=softcap or 0.0, impl=impl,
    )  # fmt: skip
    return out, None


def _weights_wanted() -> bool:
    """Whether the caller collects attention's weights, of which this attention has none."""
    if not torch.compiler.is_compiling() and _WEIGHTS.get():
        return True
    collected = None if _active_collector is None else _active_collector.get()
    return collected is not None and any("attentions" in name for name in collected)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, **options: Any
) -> Tensor:
    """(B, Tq, H, D) of q, k and v that are laid out so too."""
    lengths = None
    if mask is not None:
        causal = mask.dim() < 4
        if mask.dim() == 1:
            lengths, mask = mask, None
        else:
            mask = mask[:, None, None] if causal else mask[..., : k.shape[1]]
    options["impl"] = with_mask(options["impl"], mask)
    out = dense.attention(q, k, v, causal=causal, key_lengths=lengths, attn_mask=mask, **options)
    return cast("Tensor", out)


def _is_pytorchs(query: Tensor, mask: Tensor | None) -> bool:
    """Whether impl="auto" leaves a call to "sdpa": where no kernel was measured to be faster, and
    for few numbers and a single new token, where PyTorch's was (docs/dropin.md)."""
    if mask is not None and mask.dim() < 4 and query.shape[2] > 1:
        return False  # "sdpa" does not know these masks
    if choose("auto", query) == "torch":
        return True
    return query.shape[2] == 1 or query.numel() < _LEAST_NUMBERS


def _for_sdpa(mask: Tensor | None, keys: int) -> Tensor | None:
    """The mask for a single query, in the form that "sdpa" takes."""
    if mask is None or mask.dim() == 4:
        return mask
    if mask.dim() == 1:
        mask = torch.arange(keys, device=mask.device) < mask[:, None]
    return mask[:, None, None]


def mask(**given: Any) -> Tensor | None:
    """What transformers asks for a mask with: None where the causal one is all; how many keys each
    text has, (B,) int32, where they are padded on the right; which keys exist, (B, Tk) bool, where
    they are padded elsewhere; and for all others the mask of "sdpa"."""
    padding = given.get("attention_mask")
    if (
        padding is None
        or padding.dim() != 2
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
    before: str  # what its config named before


class _OwnMethod(_Attention):
    """An attention that computes itself, in a method `_attn` of q, k, v and masks."""

    what = "attention as one op"

    def _arguments(self, given: Any, options: Any) -> dict[str, Any] | None:
        """The arguments of a call of `_attn` by name; None where the original has to answer."""
        original: Any = self.original._attn
        bound = inspect.signature(original).bind(self, *given, **options)
        arguments = bound.arguments
        wanted = arguments.get("output_attentions") or _weights_wanted()
        if wanted or arguments.get("head_mask") is not None:
            return None
        return arguments if self.fuses(given[0]) else None

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, window: int
    ) -> Tensor:
        """Heads first in, heads first out."""
        Tq, Tk = q.shape[2], k.shape[2]
        # The mask of a text that goes on from a cache says what is causal.
        causal = mask is None or mask.shape[-2] == 1 or Tq == Tk
        dropout = self.attn_dropout.p if self.training else 0.0
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = None if mask is None else mask[..., :Tk].to(q.dtype)
        out = dense.attention(
            q, k, v, causal=causal, window=(window, -1), attn_mask=mask, dropout_p=dropout,
            softmax_scale=scale, impl=with_mask(self.impl, mask),
        )  # fmt: skip
        return cast("Tensor", out).transpose(1, 2)


class OpenAIAttention(_OwnMethod):
    """transformers' OpenAI-GPT. k comes transposed, and the result in a list."""

    def _attn(self, *given: Any, **options: Any) -> list[Any]:
        arguments = self._arguments(given, options)
        if arguments is None:
            return super()._attn(*given, **options)  # type: ignore[misc]
        q, k, v = arguments["q"], arguments["k"].transpose(2, 3), arguments["v"]
        scale = v.shape[-1] ** -0.5 if self.scale else 1.0
        return [self._run(q, k, v, arguments.get("attention_mask"), scale, -1)]


class GPTNeoAttention(_OwnMethod):
    """transformers' GPT-Neo: scores are not scaled; every other layer sees a window."""

    def _attn(self, *given: Any, **options: Any) -> tuple[Tensor, None]:
        arguments = self._arguments(given, options)
        if arguments is None:
            return super()._attn(*given, **options)  # type: ignore[misc]
        local = self.config.attention_layers[self.layer_id] == "local"
        window = self.config.window_size - 1 if local else -1
        q, k, v = (arguments[name] for name in ("query", "key", "value"))
        return self._run(q, k, v, arguments.get("attention_mask"), 1.0, window), None


class GPTJAttention(_OwnMethod):
    """transformers' GPT-J."""

    def _attn(self, *given: Any, **options: Any) -> tuple[Tensor, None]:
        arguments = self._arguments(given, options)
        if arguments is None:
            return super()._attn(*given, **options)  # type: ignore[misc]
        q, k, v = (arguments[name] for name in ("query", "key", "value"))
        scale = 1 / float(self.scale_attn)
        return self._run(q, k, v, arguments.get("attention_mask"), scale, -1), None


_BY_METHOD = {
    "transformers.models.openai.modeling_openai.Attention": OpenAIAttention,
    "transformers.models.gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention": GPTNeoAttention,
    "transformers.models.gptj.modeling_gptj.GPTJAttention": GPTJAttention,
}


def match(module: nn.Module) -> Match:
    """The kind and its facts; None where it is no attention of transformers."""
    kind = _BY_METHOD.get(class_name(module))
    if kind is not None:
        return kind, {}
    config = getattr(module, "config", None)
    forward = inspect.unwrap(type(module).forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    if config is None or "ALL_ATTENTION_FUNCTIONS" not in names:
        return None
    return Registered, {"before": config._attn_implementation}
