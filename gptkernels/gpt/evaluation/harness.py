"""A GPT as a model of EleutherAI's lm-eval, which knows it as "gptkernels".

    loglikelihood          the log-probability of a continuation behind its context, and whether
                           each of its tokens is the likeliest; a context that several requests
                           share, as the choices of a question do, is computed once
    loglikelihood_rolling  the log-probability of a whole text, in lm-eval's own windows
    generate_until         what the engine of generation writes behind a context

Texts become tokens as lm-eval's own model `hf` makes them (`TemplateLM`, whose methods these are),
and what is too long loses its beginning as it does there. So both give the same results for the
same folder, except that

    of a vocabulary that is padded past its tokenizer's, only the tokenizer's ids take part here;
    `hf` with its default logits_cache=True reads the wrong logits for a continuation that ends
        another request's continuation of the same text;
    samples are drawn from all tokens here unless a task says otherwise: transformers has a top_k of
        50, and reads the folder's generation_config.json;
    a text ends here before the stop string that is complete first; `hf` writes its token to the
        end, and more where the rest of its batch goes on, and cuts where the first of any begins.

Gao et al., "The Language Model Evaluation Harness", 2024, https://zenodo.org/records/12608602.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from gptkernels.core.checks import check_count
from gptkernels.gpt.evaluation.config import RunConfig
from gptkernels.gpt.evaluation.likelihood import Question
from gptkernels.gpt.evaluation.subject import Subject
from gptkernels.gpt.generation.checks import SLOTS
from gptkernels.gpt.generation.generate import stream
from gptkernels.gpt.generation.request import Request
from gptkernels.gpt.generation.sampling import Sampling
from gptkernels.gpt.precision import DTYPES, autocast
from gptkernels.gpt.tokenizer import beginning

_COMMANDS_DEVICE = "cuda:0"  # what lm-eval's command asks for where it was told of none
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")

# What lm-eval asks of `_loglikelihood_tokens`: the texts, which key its cache (None where they are
# a window of a longer one), and the ids of the context and of the continuation.
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("gptkernels")
class HarnessModel(TemplateLM):
    """A model and its tokenizer, as `--model_args pretrained=FOLDER,...` of lm-eval names them.

    pretrained: a Hugging Face folder, one that `train` wrote, its checkpoint.pt, or a nanoGPT
        checkpoint.
    tokenizer: "gpt1", "gpt2" or "bytes"; None takes the model's own.
    prefix_token_id: the id that stands before a text without a context; None takes the tokenizer's
        token that begins a text, or else the one that ends it, as `hf` does.
    batch_size: rows that run at a time, each with a context of its own; in generation 1, or a
        multiple of 8, to which it is rounded up. A context that several requests share runs by
        itself, and then its continuations do, which are the rows: two to four for the choices of a
        question, however large batch_size is.
    dtype, device, impl: as in `RunConfig`; cuda:0 is a CPU where there is no GPU, as in `hf`.

    Raises what `Subject.load` and `RunConfig` raise, TypeError and ValueError for a batch_size that
    is no count.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        tokenizer: str | None = None,
        prefix_token_id: int | None = None,
        batch_size: int | str = 8,
        dtype: str = "float32",
        device: str = "auto",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        # lm-eval's command gives it as a text, which may also be "auto".
        rows: Any = int(batch_size) if str(batch_size).isdecimal() else batch_size
        self._rows = check_count("batch_size", rows)
        where = "auto" if device == _COMMANDS_DEVICE else device
        run = RunConfig(batch_size=self._rows, dtype=dtype, device=where, impl=impl)
        self._subject = Subject.load(pretrained, tokenizer=tokenizer, run=run)
        self._scorer = self._subject.scorer()
        self._prefix = prefix_token_id
        if prefix_token_id is None:
            self._prefix = beginning(self._subject.tokenizer)

    @property
    def eot_token_id(self) -> int | None:
        """The id that ends a text, or None where the tokenizer has none."""
        return self._subject.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """The id before a text without a context. Raises ValueError where none is known."""
        if self._prefix is None:
            raise ValueError(
                "a text without a context needs a token before it, and the tokenizer has none that "
                "begins or ends a text: name one with prefix_token_id=ID"
            )
        return self._prefix

    @property
    def max_length(self) -> int:
        """The most tokens that the model reads at once."""
        return self._subject.length

    @property
    def max_gen_toks(self) -> int:
        """How many tokens are written where a task says nothing of it: as many as `hf` writes."""
        return 256

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self._subject.model.parameters()).device

    @property
    def batch_size(self) -> int:
        """How many rows run at a time."""
        return self._rows

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of `string`. Where lm-eval does not say whether the tokenizer's special tokens
        are put around it, they are, but for a text that begins with the prefix token itself."""
        tokenizer = self._subject.tokenizer
        if add_special_tokens is None:
            prefix = None if self._prefix is None else tokenizer.decode([self._prefix])
            add_special_tokens = prefix is None or not string.startswith(prefix)
        return tokenizer.encode(string, special=add_special_tokens)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability, in nats, of each request's text, `args` (text,), which follows the
        prefix token. A longer one than the model reads is cut into windows of `max_length` tokens,
        and each token is predicted once."""
        windows: list[TokenRequest] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (total, _) in zip(owners, answers, strict=True):
            totals[owner] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each request's context, `args` (context, settings), up to the first of the
        strings in the settings' `until`, the end of text, or `max_gen_toks` tokens.

        Raises ValueError for a setting that generation here does not have, and for a max_gen_toks
        that leaves no room for a context.
        """
        asked = [self._continued(*request.args) for request in requests]
        texts = [""] * len(requests)
        progress = tqdm(
            total=len(requests), disable=disable_tqdm, desc="Running generate_until requests"
        )
        tokenizer = self._subject.tokenizer
        events = stream(
            self._subject.model,
            asked,
            slots=1 if self.batch_size == 1 else SLOTS * math.ceil(self.batch_size / SLOTS),
            tokenizer=tokenizer,
            vocab_size=tokenizer.vocab_size,
        )
        with autocast(self.device, DTYPES[self._subject.run.dtype]), progress:
            for event in events:
                number = event.request
                texts[number] += event.text
                if event.finish_reason is not None:
                    asked_as = requests[number].args
                    self.cache_hook.add_partial("generate_until", asked_as, texts[number])
                    progress.update()
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is what greedy generation
        writes, in the order of the requests."""
        given = [self._given(context, continuation) for _, context, continuation in requests]
        sharing: defaultdict[Hashable, list[int]] = defaultdict(list)
        for number, tokens in enumerate(given):
            # A single token is computed sooner than its keys and values are copied.
            sharing[tokens if len(tokens) > 1 else number].append(number)
        asked = [
            (Question(given[numbers[0]], tuple(tuple(requests[i][2]) for i in numbers)), numbers)
            for numbers in sharing.values()
        ]
        # Rows of like length lie side by side, and the longest come first: what does not fit into
        # memory fails at once, and the time that progress foretells is rather too long.
        asked.sort(key=lambda one: (len(one[1]) > 1, -one[0].length))
        answers = [(0.0, False)] * len(requests)
        progress = tqdm(
            total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests"
        )
        found = self._scorer.score(question for question, _ in asked)
        with progress:
            for (_, numbers), likelihoods in zip(asked, found, strict=True):
                for number, likelihood in zip(numbers, likelihoods, strict=True):
                    answers[number] = (likelihood.total, likelihood.greedy)
                    texts = requests[number][0]
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answers[number])
                progress.update(len(numbers))
        return answers

    def _given(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """As much of the context's end as the model can read before the continuation."""
        room = self.max_length + 1 - len(continuation)
        if room < 1 or not continuation:
            raise ValueError(
                f"a continuation must have 1 to {self.max_length} tokens, got {len(continuation)}"
            )
        # A context of spaces alone has none left: they have become the continuation's.
        return tuple(context or [self.prefix_token_id])[-room:]

    def _continued(self, context: str, gen_kwargs: dict[str, Any]) -> Request:
        settings = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        if settings.get("num_beams") == 1:  # tasks say so that they want no search
            del settings["num_beams"]
        until, most = settings.pop("until"), settings.pop("max_gen_toks")
        temperature = settings.pop("temperature", 1.0)
        if not settings.pop("do_sample"):
            temperature = 0.0
        unknown = sorted(settings.keys() - set(_SAMPLING))
        if unknown:
            raise ValueError(
                f"generation settings here are until, max_gen_toks, do_sample, temperature, "
                f"{', '.join(_SAMPLING)}, got {', '.join(unknown)}"
            )
        room = self.max_length - most
        if room < 1:
            raise ValueError(
                f"max_gen_toks must be less than the {self.max_length} tokens that the model "
                f"reads, got {most}"
            )
        tokens = (self.tok_encode(context) or [self.prefix_token_id])[-room:]
        return Request(
            tokens,
            most,
            Sampling(temperature, **settings),
            stop=[text for text in until if text],
            eos=self.eot_token_id,
        )
