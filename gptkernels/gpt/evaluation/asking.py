"""What a model answers to prompts.

    choice       the candidate with the highest score, of equal ones the first; a score is
                 tokens          log p(candidate | prompt) over the number of the candidate's tokens
                 none            log p(candidate | prompt)
                 unconditional   log p(candidate | prompt) - log p(candidate | the task's text)
    cloze        the same, by "none"
    last-word    log p(word | prompt), and whether each token of the word is the likeliest one
    generation   the text that beam search finds

Brown et al., "Language Models are Few-Shot Learners", 2020, section 2.4.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gptkernels.gpt.evaluation.config import RunConfig, TaskConfig
from gptkernels.gpt.evaluation.likelihood import Likelihood, Question, Scorer
from gptkernels.gpt.evaluation.prompts import Prompt
from gptkernels.gpt.evaluation.subject import Subject
from gptkernels.gpt.evaluation.task import Task
from gptkernels.gpt.generation.beam import beam_search
from gptkernels.gpt.precision import DTYPES, autocast


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model answered to one prompt.

    Fields:
        text: the candidate, or what was generated.
        place: the candidate's place.
        scores: of the candidates; for "last-word" the word's log-probability, in nats.
        greedy: for "last-word", whether the model would have written the word.
    """

    prompt: Prompt
    text: str
    place: int = 0
    scores: tuple[float, ...] = ()
    greedy: bool = False


BEAM_WIDTH, LENGTH_PENALTY = 4, 0.6  # Brown et al. 2020, section 2.4


def check_settings(task: Task, config: TaskConfig, run: RunConfig) -> None:
    """Raise ValueError for a setting that would change nothing."""
    free = task.kind == "generation"
    if not free:
        for name in ("beam_width", "length_penalty"):
            if getattr(config, name) is not None:
                raise ValueError(f"{name}: task {task.name} is of kind {task.kind}, not generation")
    elif run.batch_size is not None:
        raise ValueError(
            f"batch_size: the free answers of task {task.name} are searched one by one"
        )
    if config.random_answers and not max(config.counts):
        raise ValueError("random_answers: a prompt without solved examples has none, give shots")


def normalisation(task: Task, config: TaskConfig) -> str:
    """What candidates are compared by. Raises ValueError where `config` names what `task` cannot
    have."""
    if config.normalise is None:
        return task.normalise if task.kind == "choice" else "none"
    if task.kind != "choice":
        raise ValueError(f"normalise: task {task.name} is of kind {task.kind}, which has no choice")
    if config.normalise == "unconditional" and not task.unconditional:
        raise ValueError(f"normalise: task {task.name} names no unconditional text")
    return config.normalise


def chosen(
    subject: Subject, scorer: Scorer, prompts: Iterable[Prompt], how: str, text: str = ""
) -> Iterator[Answer]:
    """The candidate that the model chooses behind each prompt; of a single one, whether it would
    have written it. Prompts are read as they are needed.

    how: a normalisation. text: the one of "unconditional".
    """
    kept, asked, *rest = itertools.tee(prompts, 3 if how == "unconditional" else 2)
    likelihoods = scorer.score(Question(prompt.tokens, prompt.answers) for prompt in asked)
    others: Iterator[tuple[Likelihood, ...]] = itertools.repeat(())
    for alone in rest:
        given = tuple(subject.tokenizer.encode(text))
        # One stream: what the questions give is the same for all, and computed once; only behind
        # it a very long answer may leave no room for the whole of it.
        others = scorer.score(
            Question(given[-(subject.length + 1 - max(map(len, prompt.answers))) :], prompt.answers)
            for prompt in alone
        )
    for prompt, found, without in zip(kept, likelihoods, others, strict=False):
        match how:
            case "tokens":
                scores = tuple(one.total / one.tokens for one in found)
            case "unconditional":
                scores = tuple(a.total - b.total for a, b in zip(found, without, strict=True))
            case _:
                scores = tuple(one.total for one in found)
        place = scores.index(max(scores))
        text_of_it = subject.tokenizer.decode(prompt.answers[place])
        yield Answer(prompt, text_of_it, place, scores, found[place].greedy)


def written(
    subject: Subject, task: Task, config: TaskConfig, prompts: Iterable[Prompt]
) -> Iterator[Answer]:
    """What the model writes behind each prompt, by beam search."""
    tokenizer, device = subject.tokenizer, subject.model.lm_head.weight.device
    alpha = LENGTH_PENALTY if config.length_penalty is None else config.length_penalty
    for prompt in prompts:
        with autocast(device, DTYPES[subject.run.dtype]):
            beam = beam_search(
                subject.model,
                prompt.tokens,
                task.max_new_tokens,
                width=config.beam_width or BEAM_WIDTH,
                alpha=alpha,
                eos=tokenizer.eos,
                stop=task.stop,
                tokenizer=tokenizer,
                vocab_size=tokenizer.vocab_size,
            )
        yield Answer(prompt, beam.text.strip(), scores=(beam.score,))
