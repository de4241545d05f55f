"""Examples as the tokens of prompts: zero, one or a few solved examples, and the one that is asked.

    description, separator, then for each of K examples: prompt, right answer, separator
    then the prompt that is asked

The K examples are drawn by a seed, anew for each question (Brown et al., "Language Models are
Few-Shot Learners", 2020, section 2.4); those for a smaller K are the first of those for a larger
one. As many as fit into the context are kept, the first drawn. Where the question alone is too
long, it loses tokens from its beginning, since its end is what an answer continues; or, where the
task names a field to cut, from the end of that field.

The control of Min et al., "Rethinking the Role of Demonstrations", 2022: the examples' answers are
drawn at random from their candidates, so that nothing can be learnt from them.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gptkernels.gpt.evaluation.examples import Example, ExampleRow
from gptkernels.gpt.evaluation.task import Task
from gptkernels.gpt.tokenizer import Tokenizer, beginning


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


@dataclass(frozen=True, slots=True)
class Asked:
    """An example that is asked: its place in its part, its group, and itself."""

    place: int
    group: str
    example: Example


class Prompter:
    """Makes prompts for a model.

    task: what the examples are of.
    tokenizer: the model's.
    length: tokens of the model's context.
    pool: the examples that prompts may hold; each is read when it is drawn first.
    same: whether the pool is the part that is asked, so that no example is drawn for itself.
    seed: decides which are drawn.
    random_answers: whether their answers are drawn at random; a task without candidates has none to
        draw from, ValueError.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        length: int,
        *,
        pool: Sequence[ExampleRow] = (),
        same: bool = False,
        seed: int = 0,
        random_answers: bool = False,
    ) -> None:
        if random_answers and task.kind in ("generation", "last-word"):
            raise ValueError(
                f"random_answers: an example of task {task.name} has no answers to draw from"
            )
        self._task, self._tokenizer, self._length = task, tokenizer, length
        self._rows, self._same, self._seed = pool, same, seed
        self._random_answers = random_answers
        self._pool: dict[str, list[int]] = defaultdict(list)
        for place, row in enumerate(pool):
            self._pool[row.group].append(place)
        self._read: dict[int, Example] = {}

    def check(self, asked: Iterable[Asked], shots: int) -> None:
        """Raise ValueError, which names the example, where there are fewer than `shots` others, an
        answer leaves no room for any of the question, or an answer has no token. So a long run does
        not end in its middle."""
        for one in asked:
            try:
                self._check(one, shots)
            except ValueError as error:
                raise ValueError(f"example {one.place}: {error}") from None

    def __call__(self, asked: Asked, shots: int) -> Prompt:
        """The prompt for an example that was checked, behind at most `shots` others. Raises
        ValueError where it has no token."""
        answers = self._answers(asked.example)
        room = self._room(answers)
        solved = self._solved(asked, shots)
        count, (text, tokens) = len(solved), self._encoded(solved, asked.example)
        if solved and len(tokens) > room:
            count, text, tokens = self._fitting(solved, asked.example, room)
        start = beginning(self._tokenizer)
        if not tokens and start is not None:
            tokens = [start]
        if not tokens:
            raise ValueError(f"example {asked.place}: the prompt {text!r} has no token")
        cut = len(tokens) > room
        if cut:
            tokens = self._cut(tokens, asked.example, room)
        return Prompt(tuple(tokens), answers, text, count, cut)

    def _check(self, asked: Asked, shots: int) -> None:
        answers = self._answers(asked.example)
        if not all(answers):
            raise ValueError("an answer has no token")
        if self._room(answers) < 1:
            longest = max(map(len, answers)) if answers else self._task.max_new_tokens
            raise ValueError(
                f"an answer of {longest} tokens leaves no room for a question in a context of "
                f"{self._length} tokens"
            )
        others = len(self._pool.get(asked.group, ())) - self._same
        if shots > others:
            of_group = f" of the group {asked.group!r}" if asked.group else ""
            raise ValueError(
                f"{shots} shots are asked for, but the task {self._task.name} has {others} "
                f"examples to draw from{of_group}"
            )

    def _answers(self, asked: Example) -> tuple[tuple[int, ...], ...]:
        if self._task.kind == "generation":
            return ()
        encode = self._tokenizer.encode
        return tuple(tuple(encode(answer, special=False)) for answer in asked.answers)

    def _room(self, answers: Sequence[Sequence[int]]) -> int:
        """For the prompt: the model does not read an answer's last token, it only predicts it."""
        behind = max(map(len, answers)) - 1 if answers else self._task.max_new_tokens
        return self._length - behind

    def _fitting(
        self, solved: Sequence[str], asked: Example, room: int
    ) -> tuple[int, str, list[int]]:
        """As many of `solved` as fit before the question; none where it does not fit alone."""
        count, (text, tokens) = 0, self._encoded((), asked)
        while len(tokens) <= room and count < len(solved):
            more = self._encoded(solved[: count + 1], asked)
            if len(more[1]) > room:
                break
            count, (text, tokens) = count + 1, more
        return count, text, tokens

    def _encoded(self, solved: Sequence[str], asked: Example) -> tuple[str, list[int]]:
        parts = [self._task.description] if self._task.description else []
        text = self._task.separator.join([*parts, *solved, asked.prompt])
        return text, self._tokenizer.encode(text)

    def _cut(self, tokens: list[int], asked: Example, room: int) -> list[int]:
        """A question that is too long, as `room` tokens."""
        if asked.kept is None:
            return tokens[-room:]
        kept = self._tokenizer.encode(asked.kept, special=False)[-room:]
        return tokens[: room - len(kept)] + kept

    def _solved(self, asked: Asked, shots: int) -> list[str]:
        """`shots` examples with their answers, in the order in which they are drawn."""
        pool = self._pool.get(asked.group, [])
        # Not the built-in hash, which differs from run to run.
        drawing = random.Random(f"{self._seed} {asked.place}")
        drawn: dict[int, str] = {}
        while len(drawn) < shots:
            place = pool[drawing.randrange(len(pool))]
            answer = drawing.random()  # drawn in any case: the control has the same examples
            if place in drawn or (self._same and place == asked.place):
                continue
            if place not in self._read:
                self._read[place] = self._rows[place].example()
            example = self._read[place]
            right = int(answer * len(example.answers)) if self._random_answers else example.right
            drawn[place] = example.prompt + example.answers[right]
        return list(drawn.values())
