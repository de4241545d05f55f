"""The engine behind `generate`: many texts continued at once, in slots.

    step    give free slots to waiting samples: prefill the prompt alone (once for all samples of a
            request), copy its keys and values into the slot
            choose a token for every slot from its logits; texts that end leave their slots
            run the model on the newest token of all R slots

With a draft, which takes one slot, a step runs the model on the newest token and some guesses
behind it, and chooses tokens as long as they are those that were guessed: all that a step without
guesses would choose, one at a time.

A step has the same shapes however many slots are taken, and no slot depends on another. So, for a
given R, a request gives the same bits alone, in any batch, in any order and in any slot. R is 1 or
a multiple of 8: of 5, 6 or 7 rows, PyTorch's matrix product on a CPU rounds the last differently
from the first. Where all layers run by the CPU kernels, 1, 8 and 16 slots give the same bits. A
text longer than block_size slides: when its slot holds block_size tokens, the last half of them is
prefilled again, which depends on the request alone too. What computes an op is chosen when the
engine is made (choices.py), so no table of measurements changes a text's bits in its middle.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gptkernels.core.checks import check_count
from gptkernels.gpt.generation.cache import CachingModel, SlotCache
from gptkernels.gpt.generation.checks import (
    check_logprob,
    check_request,
    check_slots,
    usable_ids,
)
from gptkernels.gpt.generation.choices import choices_of, running
from gptkernels.gpt.generation.draft import LOOKUP, Draft, Lookup, SmallerModel
from gptkernels.gpt.generation.request import Event, Request
from gptkernels.gpt.generation.sampling import Sampler
from gptkernels.gpt.generation.text import TextStream
from gptkernels.gpt.modes import evaluating
from gptkernels.gpt.tokenizer import Tokenizer

# A step of more tokens would be one that attention_decode's kernels are slow at.
MOST_DRAFTED = 3


@dataclass
class _Text:
    """A sample that has a slot."""

    request: int
    sample: int
    wanted: Request
    tokens: list[int]  # prompt and continuation
    held: int  # how many tokens the slot holds
    stream: TextStream | None


class Engine:
    """Continues texts with `model`, as many at a time as it has slots.

    slots: 1 or a multiple of 8; None means 8, or 1 with a draft.
    tokenizer: gives the text in events, and finds stop strings.
    vocab_size: only ids below it are chosen, for a model whose vocabulary is padded past its
        tokenizer's; None allows all of the model's.
    max_tokens: length of the longest text that will be asked for, where that is less than
        block_size. With impl="torch" on a GPU, the last bits of results depend on it.
    draft: "lookup", or a smaller model with the same ids, which guesses `draft_tokens` (1, 2 or 3)
        tokens at a time, up to the end of its own context; slots must be 1. Tokens are those chosen
        without it, where the model gives a token the same logits beside others, as it does by the
        CPU kernels; elsewhere the last bits may differ, and so a choice between equals.

    The model runs in evaluation mode, and is left in the mode it was in. Raises TypeError and
    ValueError for numbers out of range.
    """

    def __init__(
        self,
        model: CachingModel,
        *,
        slots: int | None = None,
        tokenizer: Tokenizer | None = None,
        vocab_size: int | None = None,
        max_tokens: int | None = None,
        draft: str | CachingModel | None = None,
        draft_tokens: int = MOST_DRAFTED,
    ) -> None:
        self._drafted = check_count("draft_tokens", draft_tokens)
        if self._drafted > MOST_DRAFTED:
            raise ValueError(f"draft_tokens must be at most {MOST_DRAFTED}, got {draft_tokens}")
        slots = check_slots(slots, draft)
        self._ids = usable_ids(model, vocab_size)
        self._model = model
        self._modules = list(model.modules())
        self._choices = choices_of(model)
        self._tokenizer = tokenizer
        block_size = model.config.block_size
        if max_tokens is None:
            max_tokens = block_size
        self._context = min(block_size, check_count("max_tokens", max_tokens))
        self._cache = SlotCache(model, slots, self._context)
        self._prompt = SlotCache(model, 1, self._context)  # of the request that was begun last
        self._prompt_of = -1
        device = self._cache.lengths.device
        self._sampler = Sampler(slots, self._ids, device)
        self._logits = torch.zeros(slots, self._ids, device=device)
        self._prompt_logits = self._logits[0]
        self._texts: list[_Text | None] = [None] * slots
        self._waiting: deque[tuple[int, int, Request]] = deque()
        self._submitted = 0
        self._draft = self._draft_of(draft)
        # A token that was chosen and not yet run.
        self._chosen: Tensor | None = None

    def _draft_of(self, draft: str | CachingModel | None) -> Draft | None:
        if draft is None:
            return None
        if isinstance(draft, str):
            if draft != LOOKUP:
                raise ValueError(f"draft must be {LOOKUP!r}, a model or None, got {draft!r}")
            return Lookup()
        if not (isinstance(draft, nn.Module) and hasattr(draft, "hidden_states")):
            raise TypeError(f"draft must be {LOOKUP!r}, a model or None, got {draft!r}")
        if draft.config.vocab_size < self._ids:
            raise ValueError(
                f"the draft must have the model's {self._ids} ids, got {draft.config.vocab_size}"
            )
        self._modules += draft.modules()
        return SmallerModel(draft, self._context, self._ids)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting) or any(self._texts)

    @property
    def hungry(self) -> bool:
        """Whether a further request would find a slot at the next step."""
        return len(self._waiting) < self._texts.count(None)

    def submit(self, request: Request) -> int:
        """Let `request` wait for slots; returns its number.

        Raises TypeError and ValueError for what `check_request` refuses.
        """
        number = self._submitted
        check_request(f"prompt {number}", request, self._model, self._ids, self._tokenizer)
        if request.seed is None:
            request = replace(request, seed=int(torch.randint(2**63 - 1, ())))
        self._submitted += 1
        for sample in range(request.first_sample, request.first_sample + request.samples):
            self._waiting.append((number, sample, request))
        return number

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Add a token to every text, with a draft none, one or some; returns the events, in the
        order of slots and tokens.

        Raises RuntimeError where the model's logits give no probabilities, and whatever the model
        raises; the engine cannot be used after that.
        """
        device_type = self._cache.lengths.device.type
        with evaluating(self._modules), running(self._choices, device_type):
            events = self._fill()
            if any(self._texts):
                tokens, self._chosen = self._chosen, None
                if tokens is None:
                    tokens = self._choose(events)
                if self._draft is None or not self._check_guesses(self._draft, tokens, events):
                    self._run(tokens)
        return events

    def _choose(self, events: list[Event]) -> Tensor:
        """The next token of every text, whose events are added."""
        tokens, logprobs = self._sampler.choose(self._logits)
        # A single copy, so that the host waits once; fp64 holds both exactly.
        events += self._take(*torch.stack([tokens.double(), logprobs.double()]).tolist())
        return tokens

    def _check_guesses(self, draft: Draft, tokens: Tensor, events: list[Event]) -> bool:
        """Run the model on the newest token and what is guessed behind it, and choose tokens up to
        the first that was guessed wrong. Returns False where nothing is guessed."""
        text = self._texts[0]
        if text is None:
            return False
        wanted = text.wanted.max_new_tokens - (len(text.tokens) - len(text.wanted.tokens))
        count = min(self._drafted, self._context - text.held - 1, wanted - 1)
        guesses = draft.propose(text.tokens, count) if count > 0 else []
        if not guesses:
            return False
        given = torch.cat([tokens, tokens.new_tensor(guesses)])[None]
        hidden = self._model.hidden_states(given, cache=self._cache)
        logits = self._model.logits(hidden[0])[:, : self._ids].float()
        text.held += 1
        for row, guess in enumerate(guesses):
            self._logits = logits[row : row + 1]
            chosen = self._choose(events)
            if self._texts[0] is None:
                return True
            if int(chosen) != guess:
                self._cache.cut(0, text.held)
                self._chosen = chosen
                return True
            text.held += 1
        self._logits = logits[len(guesses) :]
        return True

    def _fill(self) -> list[Event]:
        events = []
        while self._waiting and None in self._texts:
            number, sample, request = self._waiting.popleft()
            if request.max_new_tokens == 0:
                events.append(Event(number, sample, None, None, "", "length"))
                continue
            if self._prompt_of != number:
                prompt = torch.tensor(request.tokens, device=self._cache.lengths.device)
                self._prompt_logits = self._prefill(self._prompt, 0, prompt)
                self._prompt_of = number
            slot = self._texts.index(None)
            tokens = list(request.tokens)
            self._cache.copy(slot, self._prompt, 0, len(tokens))
            self._logits[slot] = self._prompt_logits
            self._sampler.begin(slot, request.sampling, request.seed or 0, sample, tokens)
            stream = None
            if self._tokenizer is not None:
                stream = TextStream(self._tokenizer, tokens, request.stop)
            self._texts[slot] = _Text(number, sample, request, tokens, len(tokens), stream)
        return events

    def _prefill(self, cache: SlotCache, slot: int, tokens: Tensor) -> Tensor:
        hidden = self._model.hidden_states(tokens[None], cache=cache, slot=slot)
        return self._model.logits(hidden[:, -1])[0, : self._ids].float()

    def _take(self, tokens: list[float], logprobs: list[float]) -> list[Event]:
        """Add the chosen tokens to their texts; those that end leave their slots."""
        events = []
        for slot, text in enumerate(self._texts):
            if text is None:
                continue
            token, logprob = int(tokens[slot]), logprobs[slot]
            check_logprob(logprob, len(text.tokens), f"prompt {text.request}")
            event = _next_event(text, token, logprob)
            events.append(event)
            if event.finish_reason is not None:
                self._texts[slot] = None
                self._cache.release(slot)
                self._sampler.release(slot)
        return events

    def _run(self, tokens: Tensor) -> None:
        """Compute the logits that follow the newest token of each text."""
        sliding = []
        for slot, text in enumerate(self._texts):
            if text is not None and text.held == self._context:
                sliding.append((slot, text))
                self._cache.release(slot)
        if self._texts.count(None) + len(sliding) < len(self._texts):
            hidden = self._model.hidden_states(tokens[:, None], cache=self._cache)
            self._logits = self._model.logits(hidden[:, 0])[:, : self._ids].float()
        for text in filter(None, self._texts):
            text.held += 1
        for slot, text in sliding:
            text.held = max(1, self._context // 2)
            last = torch.tensor(text.tokens[-text.held :], device=tokens.device)
            self._logits[slot] = self._prefill(self._cache, slot, last)


def _next_event(text: _Text, token: int, logprob: float) -> Event:
    wanted = text.wanted
    text.tokens.append(token)
    if token == wanted.eos:
        reason, new = "eos", ""
    else:
        new = text.stream.push(token) if text.stream else ""
        reason = None
        if len(text.tokens) - len(wanted.tokens) == wanted.max_new_tokens:
            reason = "length"
    if reason is not None and text.stream is not None:
        new += text.stream.end()
    if text.stream is not None and text.stream.stopped:
        reason = "stop"
    return Event(text.request, text.sample, token, logprob, new, reason)
