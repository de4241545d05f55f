"""Seconds to the first token behind a long prompt, by the candidates of `gpt_generate`.

One token needs no cache, so the plain twin and transformers' model stand beside it as one compiled
forward pass of known size too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gptkernels.bench.case import Call, Case
from gptkernels.bench.cases import gpt
from gptkernels.bench.cases.dtypes import narrow_on_a_gpu
from gptkernels.bench.cases.gpt import TRANSFORMERS, TWIN
from gptkernels.bench.cases.gpt_generate import Shape, Texts
from gptkernels.bench.peers import packages


def shapes(device_type: str, level: str) -> Sequence[Shape]:
    """GPT-2's smallest model, and on a CPU a small one in brief."""
    if level == "quick" and device_type != "cuda":
        return (Shape(gpt.SMALLEST, 1, 128, 1),)
    prompts = {"quick": (512,), "default": (512, 1000), "full": (512, 1000)}[level]
    return tuple(Shape(gpt.GPT2_124M, 1, prompt, 1) for prompt in prompts)


dtypes = narrow_on_a_gpu


def cases(
    shape: Shape, dtype: torch.dtype, device: torch.device, impls: Sequence[str]
) -> Iterator[Case]:
    """The one case of a shape."""
    gpt.forget_graphs()
    texts = Texts(shape, dtype, device)

    def plain_compiled() -> Call:
        return texts.without_cache(gpt.compiled(texts.likeliest_of_plain()))

    def theirs_compiled() -> Call:
        model = texts.weights.transformers

        def likeliest(tokens: Tensor) -> Tensor:
            found: Tensor = model(tokens, use_cache=False, logits_to_keep=1).logits
            return found.argmax(-1)

        return texts.without_cache(gpt.compiled(likeliest, whole=False))

    peers: dict[str, Callable[[], Call]] = {f"{TWIN}, torch.compile": plain_compiled}
    if packages.is_installed(TRANSFORMERS):
        peers[TRANSFORMERS] = texts.theirs
        peers[f"{TRANSFORMERS}, torch.compile"] = theirs_compiled
    tokens = shape.batch * shape.prompt
    yield texts.case("gpt_first_token", impls, texts.plain, peers, tokens=tokens)
