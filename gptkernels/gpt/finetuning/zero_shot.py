"""What a language model answers without fine-tuning, by the heuristics of GPT-1's paper.

    classes    the text, the task's prompt (" very"), and one of the task's answers (" positive"):
               the class whose answer has the highest log-probability, that of all its tokens
    choices    the text, the prompt, and one of the example's choices: the choice with the highest
               mean log-probability of a token, since choices are of different lengths

Spaces at the end of a text are left out, so that what follows begins a word, as it does within a
text; so a choice gets a space before it where the prompt ends with none. A text that is too long
for the model loses tokens from its beginning: its end is what the answer continues.

Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018, section 5,
"Zero-shot Behaviors".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gptkernels.gpt.finetuning.batches import Encoded, collate, in_order
from gptkernels.gpt.finetuning.reading import Example
from gptkernels.gpt.finetuning.task import Task, ZeroShot
from gptkernels.gpt.finetuning.task_model import side_by_side
from gptkernels.gpt.model import GPT
from gptkernels.gpt.precision import autocast, full_logits
from gptkernels.gpt.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Question(Encoded):
    """An example as its text with each possible answer after it.

    Fields:
        given: how many tokens of each row are the text's; the others are an answer's.
    """

    given: int = 0


def heuristic(task: Task) -> ZeroShot:
    """How `task` is asked. Raises ValueError for a task that says nothing of it."""
    if task.zero_shot is None:
        raise ValueError(f"task {task.name} has no [zero_shot], so only a fine-tuned model does it")
    return task.zero_shot


def questions(
    task: Task, examples: Sequence[Example], tokenizer: Tokenizer, length: int
) -> list[Question]:
    """`examples` in rows of at most `length` tokens, the model's context.

    Raises ValueError for a task without a heuristic, for an answer that leaves no room for any of
    the text, and for a text and an answer without a token.
    """
    how = heuristic(task)
    return [_question(how, example, tokenizer, length) for example in examples]


@torch.inference_mode()
def guesses(
    model: GPT, task: Task, asked: Sequence[Question], batch_size: int, dtype: torch.dtype
) -> list[int]:
    """The index of the class or choice that `model` guesses for each question, in their order; of
    equal ones the first. `dtype`: float32, or a narrower one for autocast; log-probabilities are
    computed in float32. Leaves the model in evaluation mode."""
    model.eval()
    device = model.lm_head.weight.device
    found = [0] * len(asked)
    for numbers in in_order(asked, batch_size):
        part = [asked[i] for i in numbers]
        batch = collate(part, number=False).to(device)
        # The places before the tokens of the answers: the model reads no other logits.
        given = torch.tensor([one.given for one in part], device=device)[batch.owner]
        rows = batch.places // batch.tokens.shape[1]
        of_answer = batch.places % batch.tokens.shape[1] >= given[rows] - 1
        places, rows = batch.places[of_answer], rows[of_answer]
        with autocast(device, dtype):
            hidden = model.hidden_states(batch.tokens).flatten(0, 1)
            logits = full_logits(model, hidden[places])
        likely = -F.cross_entropy(logits, batch.following[of_answer], reduction="none")
        scores = likely.new_zeros(len(given)).index_add(0, rows, likely)
        if task.choice:
            scores /= rows.bincount(minlength=len(given))
        for i, guess in zip(numbers, side_by_side(scores, batch).argmax(1).tolist(), strict=True):
            found[i] = guess
    return found


def _question(how: ZeroShot, example: Example, tokenizer: Tokenizer, length: int) -> Question:
    text = tokenizer.encode("\n".join(example.texts).rstrip() + how.prompt)
    gap = "" if how.prompt[-1:].isspace() else " "
    answers = [
        tokenizer.encode(answer, special=False)
        for answer in how.answers or [gap + choice for choice in example.choices]
    ]
    room = length - max(map(len, answers))
    if room < 1:
        raise ValueError(
            f"an answer of {length - room} tokens leaves no room for a text in a context of "
            f"{length} tokens"
        )
    if not text or not all(answers):
        raise ValueError(f"the text {example.texts[0]!r} or an answer to it has no token")
    kept = text[-room:]
    rows = [kept + answer for answer in answers]
    return Question(rows, example.target, len(kept) < len(text), len(kept))
