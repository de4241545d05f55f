"""`generate` of transformers, its arguments and its results, by the engine of generation.

    transformers' settings          here
    max_new_tokens, max_length      Request.max_new_tokens (the length counts the padded prompt)
    do_sample=False                 temperature 0
    temperature, top_k, top_p, min_p, repetition_penalty    Sampling: they mean the same
    num_return_sequences            Request.samples
    eos_token_id, pad_token_id      the end of a row, and what fills it up
    attention_mask                  what pads a prompt on its left is taken off

Each row is a request of its own, so a padded row gives what it gives alone. A text may be longer
than the model's context: it slides (engine.py). All other settings are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gptkernels.gpt.generation.cache import CachingModel
from gptkernels.gpt.generation.engine import Engine
from gptkernels.gpt.generation.request import Request
from gptkernels.gpt.generation.sampling import Sampling

_NEW_TOKENS, _TOP_K = 20, 50  # transformers' own, where nothing is said
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
# What changes no token here: keys and values are always kept, and a prompt is always there.
_WITHOUT_EFFECT = ("use_cache", "bos_token_id", "transformers_version")
KNOWN = frozenset(
    (
        *("max_new_tokens", "max_length", "do_sample", "repetition_penalty", *_SAMPLING),
        *("num_return_sequences", "eos_token_id", "pad_token_id", *_WITHOUT_EFFECT),
    )
)


def generate(
    model: CachingModel,
    tokens: Tensor,
    attention_mask: Tensor | None,
    settings: Mapping[str, Any],
    streamer: Any = None,
) -> Tensor:
    """tokens (B, T) int64 with up to the wanted number more behind each: (B * n, T + new) int64,
    the n samples of a row one after the other.

    attention_mask: (B, T), 0 where a row is padded, on its left; None takes the pad_token_id's
    places there, if that is not the eos_token_id. settings: those in `KNOWN`. streamer: gets the
    prompt and each token as it is chosen (`put`), and the end (`end`); of one row alone.

    Raises ValueError for settings out of range and for padding elsewhere, and what
    `gptkernels.GPT.generate` raises.
    """
    model.check_tokens(tokens)
    B, T = tokens.shape
    eos, pad = _end(settings.get("eos_token_id")), settings.get("pad_token_id")
    if attention_mask is None and pad is not None and pad != eos:
        attention_mask = tokens != pad
    samples = _or(settings.get("num_return_sequences"), 1)
    if streamer is not None and B * samples != 1:
        raise ValueError(f"a streamer takes one text, got {B * samples}")
    wanted = _new_tokens(settings, T)
    how = _sampling(settings)
    if samples != 1 and how.temperature == 0:
        raise ValueError(f"num_return_sequences needs do_sample=True, got {samples} of one text")
    engine = Engine(model, slots=1 if B * samples == 1 else None, max_tokens=T + wanted)
    for prompt in _prompts(tokens, attention_mask):
        engine.submit(Request(prompt, wanted, how, samples=samples, eos=eos))
    if streamer is not None:
        streamer.put(tokens.cpu())
    new: list[list[int]] = [[] for _ in range(B * samples)]
    while engine.busy:
        for event in engine.step():
            if event.token is not None:
                new[event.request * samples + event.sample].append(event.token)
                if streamer is not None:
                    streamer.put(torch.tensor([event.token]))
    if streamer is not None:
        streamer.end()
    longest = max(map(len, new), default=0)
    text = tokens.new_full((B * samples, T + longest), _or(pad, _or(eos, 0)))
    text[:, :T] = tokens.repeat_interleave(samples, 0)
    for row, added in zip(text, new, strict=True):
        row[T : T + len(added)] = row.new_tensor(added)
    return text


def check_mask(mask: Tensor, tokens: Tensor) -> None:
    """Raise ValueError for an attention_mask of another shape than the tokens."""
    if mask.shape != tokens.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(tokens.shape)}, "
            f"got {tuple(mask.shape)}"
        )


def padded_right(mask: Tensor) -> bool:
    """Whether a mask (B, T) hides tokens at the ends of rows alone. Waits for its device."""
    there = mask != 0
    return bool((there[:, 1:] <= there[:, :-1]).all())


def _prompts(tokens: Tensor, mask: Tensor | None) -> Iterable[list[int]]:
    """The rows of tokens, without what the mask hides on their left."""
    if mask is None:
        return tokens.tolist()
    check_mask(mask, tokens)
    if not padded_right(mask.flip(1)) or not bool(mask[:, -1].all()):
        raise ValueError(
            "padding must be on the left of each row (tokenizer.padding_side = 'left'), before at "
            "least one token, for a text to be continued"
        )
    return [row[there].tolist() for row, there in zip(tokens, mask != 0, strict=True)]


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    penalty = _or(settings.get("repetition_penalty"), 1.0)
    if not settings.get("do_sample"):
        return Sampling(0.0, repetition_penalty=penalty)
    given = {"top_k": _TOP_K, **{name: settings[name] for name in _SAMPLING if name in settings}}
    temperature = _or(given.pop("temperature", None), 1.0)
    given["top_k"] = given["top_k"] or None  # 0 removes no token, as None
    return Sampling(temperature, repetition_penalty=penalty, **given)


def _new_tokens(settings: Mapping[str, Any], length: int) -> int:
    if settings.get("max_new_tokens") is not None:
        return int(settings["max_new_tokens"])
    if settings.get("max_length") is None:
        return _NEW_TOKENS
    room = int(settings["max_length"]) - length
    if room < 1:
        raise ValueError(
            f"max_length must be more than the {length} tokens of input_ids, got "
            f"{settings['max_length']}"
        )
    return room


def _end(given: Any) -> int | None:
    ends = given if isinstance(given, list | tuple) else [given]
    if len(ends) != 1:
        raise ValueError(f"eos_token_id must be one id, got {list(ends)}")
    end: int | None = ends[0]
    return end


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
