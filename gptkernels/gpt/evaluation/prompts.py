"""Examples as the tokens of prompts: zero, one or a few solved examples, and the one that is asked.

    description, separator, then for each of K examples: prompt, right answer, separator
    then the prompt that is asked

The K examples are drawn by a seed, anew for each question (Brown et al., "Language Models are
Few-Shot Learners", 2020, section 2.4); those for a smaller K are the first of those for a larger
one. As many as fit into the context are kept, the first drawn. Where the question alone is too
long, it loses tokens from its beginning: its end is what an answer continues.

The control of Min et al., "Rethinking the Role of Demonstrations", 2022: the examples' answers are
drawn at random from their candidates, so that nothing can be learnt from them.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from gptkernels.gpt.evaluation.examples import Example
from gptkernels.gpt.evaluation.task import Task
from gptkernels.gpt.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads.

    Fields:
        tokens: at least one.
        answers: the tokens of what may follow; none for a task that is answered freely.
        text: what `tokens` are of, before it was cut.
        shots: how many solved examples it holds.
        cut: whether the question alone was too long.
    """

    tokens: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    text: str
    shots: int
    cut: bool


class Prompter:
    """Makes prompts for a model.

    task: what the examples are of.
    tokenizer: the model's.
    length: tokens of the model's context.
    pool: the examples that prompts may hold.
    seed: decides which.
    random_answers: whether their answers are drawn at random; a task that is answered freely has
        no candidates to draw from, ValueError.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        length: int,
        *,
        pool: Sequence[Example] = (),
        seed: int = 0,
        random_answers: bool = False,
    ) -> None:
        if random_answers and task.kind in ("generation", "last-word"):
            raise ValueError(
                f"random_answers: an example of task {task.name} has no answers to draw from"
            )
        self._task, self._tokenizer, self._length = task, tokenizer, length
        self._seed, self._random_answers = seed, random_answers
        self._pool: dict[str, list[Example]] = defaultdict(list)
        for example in pool:
            self._pool[example.group].append(example)

    def __call__(self, number: int, asked: Example, shots: int) -> Prompt:
        """The prompt for the example `asked`, which is the task's example `number`, behind at most
        `shots` others.

        Raises ValueError where there are not that many, where an answer leaves no room for any of
        the question, and for a prompt or an answer without a token.
        """
        answers = self._answers(asked)
        behind = max(map(len, answers)) - 1 if answers else self._task.max_new_tokens
        room = self._length - behind
        if room < 1:
            raise ValueError(
                f"an answer of {behind + bool(answers)} tokens leaves no room for a question in a "
                f"context of {self._length} tokens"
            )
        solved = self._solved(number, asked, shots)
        for count in range(len(solved), -1, -1):
            text = self._text(solved[:count], asked)
            tokens = self._tokenizer.encode(text)
            if len(tokens) <= room:
                break
        if not tokens and self._tokenizer.eos is not None:
            tokens = [self._tokenizer.eos]
        if not tokens or not all(answers):
            raise ValueError(f"the prompt {text[-80:]!r} or an answer to it has no token")
        return Prompt(tuple(tokens[-room:]), answers, text, count, len(tokens) > room)

    def _answers(self, asked: Example) -> tuple[tuple[int, ...], ...]:
        if self._task.kind == "generation":
            return ()
        return tuple(tuple(self._tokenizer.encode(answer)) for answer in asked.answers)

    def _text(self, solved: Sequence[str], asked: Example) -> str:
        parts = [self._task.description] if self._task.description else []
        return self._task.separator.join([*parts, *solved, asked.prompt])

    def _solved(self, number: int, asked: Example, shots: int) -> list[str]:
        """`shots` examples with their answers, in the order in which they are drawn."""
        pool = self._pool.get(asked.group, [])
        others = len(pool) - any(example is asked for example in pool)
        if shots > others:
            of_group = f" of the group {asked.group!r}" if asked.group else ""
            raise ValueError(
                f"shots: {shots} examples are asked for, but the task {self._task.name} has "
                f"{others} to draw from{of_group}"
            )
        # Not the built-in hash, which differs from run to run.
        drawing = random.Random(f"{self._seed} {number}")
        drawn: dict[int, str] = {}
        while len(drawn) < shots:
            place = drawing.randrange(len(pool))
            answer = drawing.random()  # drawn in any case: the control has the same examples
            if place in drawn or pool[place] is asked:
                continue
            example = pool[place]
            right = int(answer * len(example.answers)) if self._random_answers else example.right
            drawn[place] = example.prompt + example.answers[right]
        return list(drawn.values())
