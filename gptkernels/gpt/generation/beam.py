"""Beam search: the best continuation that `width` texts find, grown side by side.

    score(Y) = log P(Y | prompt) / penalty(|Y|)        penalty(n) = ((5 + n) / 6) ** alpha

    prefill   the prompt once; its keys and values are copied into `width` slots
    step      order the beams with one more token each, all V tokens, by their log-probability;
              the first `width` that have not ended take the slots 0, 1, ... and go on,
              the others before them are results
    until     no beam goes on, or none can still get a better score than the best result

An end takes no beam's place. |Y| counts all tokens of a continuation, also those that end it.
With alpha > 0 a longer text, whose log-probability is lower in any case, is divided by more.

Wu et al., "Google's Neural Machine Translation System", 2016, section 7, equation 14, whose beta is
0 without an encoder to attend to. Brown et al., "Language Models are Few-Shot Learners", 2020,
section 2.4, search by 4 beams with alpha 0.6. Beams go on as in transformers' `generate`, whose
penalty is another one, n ** length_penalty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptkernels.core.checks import check_count, check_number
from gptkernels.gpt.generation.cache import CachingModel, SlotCache
from gptkernels.gpt.generation.checks import check_logprob, check_request, usable_ids
from gptkernels.gpt.generation.choices import choices_of, running
from gptkernels.gpt.generation.request import Request
from gptkernels.gpt.generation.text import TextStream
from gptkernels.gpt.modes import evaluating
from gptkernels.gpt.precision import full_logits
from gptkernels.gpt.tokenizer import Tokenizer

_PROMPT = "the prompt"
# The papers have 0 to 1. Powers of some hundreds no longer fit a float.
_LARGEST_ALPHA = 10.0


@dataclass(frozen=True, slots=True)
class Beam:
    """The continuation that was found.

    Fields:
        tokens: its ids, with those that end it: eos, or a stop string's.
        text: what they spell, up to the eos or the stop string; empty without a tokenizer.
        logprob: the log-probability of all its tokens, in nats.
        score: logprob divided by the penalty of its length.
    """

    tokens: tuple[int, ...]
    text: str
    logprob: float
    score: float


@torch.no_grad()
def beam_search(
    model: CachingModel,
    tokens: Sequence[int],
    max_new_tokens: int,
    *,
    width: int = 4,
    alpha: float = 0.6,
    eos: int | None = None,
    stop: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
) -> Beam:
    """The continuation of the ids `tokens` with the best score, of all that the search sees end.

    max_new_tokens: the most tokens that are added, at least 1; a text of so many has ended.
    width: how many beams go on. Of equally likely ones, those of the likelier beam do, and of one
        beam those of the lower ids.
    alpha: 0 compares log-probabilities; above it longer texts are favoured, below it shorter ones.
        With width 1 the search is greedy up to alpha 0. Above it, the likeliest token that does not
        end the text goes on beside one that does, since a longer text may get a better score.
    eos: an id that ends a text.
    stop: strings that end a text, which then ends before them; they need a tokenizer.
    tokenizer: gives the text, and finds stop strings.
    vocab_size: only ids below it are chosen; None allows all of the model's.

    The model runs in evaluation mode, and is left in the mode it was in. Autocast narrows its
    blocks, but not its head. Raises ValueError for an argument out of range and where prompt and
    continuation together do not fit into block_size, TypeError for an argument of another type, and
    RuntimeError where the model's logits hold NaN or infinity.
    """
    request = Request(tokens, max_new_tokens, stop=stop, eos=eos)
    ids = usable_ids(model, vocab_size)
    check_request(_PROMPT, request, model, ids, tokenizer)
    size, longest = model.config.block_size, len(request.tokens) + max_new_tokens
    check_count("max_new_tokens", max_new_tokens)
    if longest > size:
        raise ValueError(
            f"{_PROMPT} and max_new_tokens must fit into block_size={size} together, "
            f"got {len(request.tokens)} + {max_new_tokens} tokens"
        )
    check_count("width", width)
    check_number("alpha", alpha)
    if not abs(alpha) <= _LARGEST_ALPHA:
        raise ValueError(f"alpha must lie in {-_LARGEST_ALPHA}...{_LARGEST_ALPHA}, got {alpha}")
    stream = None if tokenizer is None else TextStream(tokenizer, request.tokens, request.stop)
    cache = SlotCache(model, width, longest)
    with evaluating(model.modules()), running(choices_of(model), cache.lengths.device.type):
        return _search(model, request, _Growing((), "", 0.0, stream), cache, ids, alpha)


@dataclass(frozen=True, slots=True)
class _Growing:
    """A beam, and what its next token's text depends on."""

    tokens: tuple[int, ...]
    text: str
    logprob: float
    stream: TextStream | None

    def extended(self, token: int, logprob: float, wanted: Request) -> tuple[_Growing, bool]:
        """This beam with one more token, now of this log-probability; and whether it has ended."""
        tokens = (*self.tokens, token)
        ended = token == wanted.eos or len(tokens) == wanted.max_new_tokens
        if self.stream is None:
            return _Growing(tokens, "", logprob, None), ended
        stream = self.stream.fork()
        new = "" if token == wanted.eos else stream.push(token)
        if ended:
            new += stream.end()
        return _Growing(tokens, self.text + new, logprob, stream), ended or stream.stopped


def _search(
    model: CachingModel, wanted: Request, empty: _Growing, cache: SlotCache, ids: int, alpha: float
) -> Beam:
    device, start, width = cache.lengths.device, len(wanted.tokens), cache.slots
    prompt = torch.tensor([wanted.tokens], device=device)
    hidden = model.hidden_states(prompt, cache=cache, slot=0)[:, -1]
    cache.copy(slice(1, None), cache, 0, start)
    beams, held = [empty], start
    so_far = torch.zeros(1, 1, dtype=torch.float64, device=device)
    over: list[Beam] = []
    while True:
        logprobs = full_logits(model, hidden)[:, :ids].double().log_softmax(dim=-1)
        # With no more than eos to end them, so many hold `width` that go on.
        ordered = _in_order(so_far + logprobs, 2 * width, held)
        going, results = _grown(beams, ordered, width, wanted, alpha)
        over += results
        beams = [beam for _, beam in going]
        best = max(over, key=lambda beam: beam.score, default=None)
        if best is not None and (not beams or best.score >= _best_possible(beams, wanted, alpha)):
            return best
        # A copy to the device waits for what runs there, and before the model nothing does.
        so_far = so_far.new_tensor([[beam.logprob] for beam in beams])
        tokens = [beam.tokens[-1] for beam in beams] + [0] * (width - len(beams))
        newest = torch.tensor(tokens, device=device)[:, None]
        cache.reorder([source for source, _ in going], start, held)
        hidden = model.hidden_states(newest, cache=cache)[: len(beams), 0]
        held += 1


def _grown(
    beams: Sequence[_Growing],
    ordered: Iterable[tuple[int, int, float]],
    width: int,
    wanted: Request,
    alpha: float,
) -> tuple[list[tuple[int, _Growing]], list[Beam]]:
    """Of the continuations (beam, token, total), the likeliest first: those that go on, each with
    the place of the beam that it continues; and the results."""
    going, results = [], []
    for source, token, total in ordered:
        beam, ended = beams[source].extended(token, total, wanted)
        if ended:
            score = total / _penalty(len(beam.tokens), alpha)
            results.append(Beam(beam.tokens, beam.text, total, score))
        else:
            going.append((source, beam))
        # At the greatest length none goes on, and the first result is the best.
        if len(going) == width or len(beam.tokens) == wanted.max_new_tokens:
            break
    return going, results


def _penalty(length: int, alpha: float) -> float:
    return ((5 + length) / 6) ** alpha


def _best_possible(beams: Sequence[_Growing], wanted: Request, alpha: float) -> float:
    """No continuation of the beams, the likeliest first, gets a score above this."""
    # A log-probability is at most 0 and never grows, so what counts is the largest penalty: that of
    # the greatest length, or where alpha is negative of the next one.
    lengths = (len(beams[0].tokens) + 1, wanted.max_new_tokens)
    return beams[0].logprob / max(_penalty(length, alpha) for length in lengths)


def _in_order(totals: Tensor, count: int, held: int) -> Iterator[tuple[int, int, float]]:
    """The continuations of the log-probabilities `totals` (B, V) as (beam, token, total), the
    likeliest first; of equals the earlier beam's, then the lower ids. One without any probability
    is none. `count` of them are looked for at first, and more where these do not suffice.

    Raises RuntimeError where the totals, behind `held` tokens, hold NaN.
    """
    flat, V = totals.flatten(), totals.shape[1]
    given, least = 0, math.inf
    while least > -math.inf:
        values, places = flat.topk(min(count, len(flat)))
        # A single copy, so that the host waits once; fp64 holds both exactly.
        found = torch.stack([values, places.double()], dim=1).tolist()
        check_logprob(found[0][0], held, _PROMPT)  # NaN is before all numbers
        # Some that equal the last may be missing, and topk gives equals in any order.
        least = found[-1][0] if count < len(flat) else -math.inf
        certain = sorted((-value, int(place)) for value, place in found if value > least)
        for value, place in certain[given:]:
            yield place // V, place % V, -value
        given, count = len(certain), 2 * count
