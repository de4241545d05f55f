"""The command `gptkernels generate`: what continues texts with a trained model.

Prompts come from options or, line by line, from standard input; they are taken up while others are
still being continued. Results are printed in the order of the prompts: as text, the first of those
that are not finished as it comes; or as JSON, an object a line.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptkernels.cli import options
from gptkernels.cli.prompts import Lines, Printer

if TYPE_CHECKING:
    from gptkernels.gpt.model import GPT


@click.command("generate", context_settings={"show_default": True})
@click.argument("model", type=options.PATH)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="Text to continue; may be repeated.  [default: the lines of standard input]",
)
@click.option(
    "--max-new-tokens", type=int, default=100, help="Tokens that a text is continued by, at most."
)
@click.option("--samples", type=int, default=1, help="Continuations of each prompt.")
@click.option(
    "--temperature",
    type=float,
    default=1.0,
    help="Divisor of the logits: below 1 likely tokens become likelier; 0 takes the likeliest.",
)
@click.option("--top-k", type=int, help="Sample among so many of the likeliest tokens.")
@click.option(
    "--top-p",
    type=float,
    help="Sample among the likeliest tokens that together reach this probability.",
)
@click.option(
    "--min-p",
    type=float,
    help="Sample among the tokens at least so many times as likely as the likeliest.",
)
@click.option(
    "--repetition-penalty",
    type=float,
    default=1.0,
    help="Above 1, tokens that the text holds already become less likely.",
)
@click.option("--stop", multiple=True, help="End a text before this string; may be repeated.")
@click.option(
    "--seed",
    type=int,
    help="Seed that gives the same samples again, in any batch.  [default: a new one]",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line.")
@click.option(
    "--logprobs", is_flag=True, help="Print log-probabilities of tokens too, with --json."
)
@click.option(
    "--slots",
    type=int,
    help="Texts at a time: 1 or a multiple of 8.  [default: 8; 1 with --draft]",
)
@click.option(
    "--draft",
    help='Guess tokens and check them together: "lookup" (what followed the same words before), or '
    "a smaller model with the same tokens. With the CPU kernels the text stays the same.",
)
@click.option("--draft-tokens", type=int, default=3, help="Guesses at a time of --draft, 1 to 3.")
@options.tokenizer_option
@options.impl
@options.device
def command(
    model: Path,
    prompts: tuple[str, ...],
    max_new_tokens: int,
    samples: int,
    stop: tuple[str, ...],
    seed: int | None,
    as_json: bool,
    logprobs: bool,
    slots: int | None,
    draft: str | None,
    draft_tokens: int,
    tokenizer: str | None,
    impl: str,
    device: str,
    **sampling: Any,
) -> None:
    """Continue texts with MODEL: a Hugging Face GPT-2 or OpenAI-GPT folder, a folder that `train`
    wrote, its checkpoint.pt, or a nanoGPT checkpoint.

    Without --prompt every line of standard input is one, taken up as soon as it is there. A text
    does not depend on the others, and with --seed is the same every time.

    \b
    Examples:
        gptkernels generate run --prompt "The " --top-k 50
        gptkernels generate gpt2-folder --temperature 0 --json < prompts.txt
    """
    if logprobs and not as_json:
        raise ValueError("logprobs are printed with --json only")
    import torch

    from gptkernels.core.device import choose_device
    from gptkernels.gpt.generation.checks import check_slots
    from gptkernels.gpt.generation.draft import LOOKUP
    from gptkernels.gpt.generation.engine import Engine, Request
    from gptkernels.gpt.generation.sampling import Sampling
    from gptkernels.gpt.loading import load, load_network

    check_slots(slots, draft)
    how = Sampling(**sampling)
    template = Request((), max_new_tokens, how, samples=samples, seed=seed, stop=stop)

    def request(prompt: str) -> Request:
        drawn = int(torch.randint(2**63 - 1, ())) if seed is None else seed
        tokens = vocabulary.encode(prompt)
        return replace(template, tokens=tokens, seed=drawn, eos=vocabulary.eos)

    where = choose_device(device)
    network, vocabulary = load(model, tokenizer)
    network.set_impl(impl)
    network.to(where)
    guesses: str | GPT | None = draft
    if draft is not None and draft != LOOKUP:
        guesses = load_network(Path(draft), "draft")[0].set_impl(impl).to(where)
    given = [(prompt, request(prompt)) for prompt in prompts]
    engine = Engine(
        network, slots=slots, tokenizer=vocabulary, vocab_size=vocabulary.vocab_size, draft=guesses,
        draft_tokens=draft_tokens,
    )  # fmt: skip
    printer = Printer(vocabulary, as_json, logprobs)
    for prompt, wanted in given:
        printer.expect(engine.submit(wanted), prompt, wanted)
    lines = None if prompts else Lines()
    refused = None
    while True:
        while lines is not None and not lines.ended and not refused and engine.hungry:
            line = lines.take(wait=not engine.busy)
            if line is None:
                break
            try:
                wanted = request(line)
                printer.expect(engine.submit(wanted), line, wanted)
            except ValueError as error:
                refused = error  # once the lines before it are finished
        if not engine.busy:
            break
        for event in engine.step():
            printer.take(event)
    if refused is not None:
        raise refused
