"""This package's models in EleutherAI's lm-eval, as `--model gptkernels`.

`python -m gptkernels.lm_eval` is lm-eval's own command, with all its arguments: lm-eval up to
0.4.13 looks for no models in other packages, so that `lm_eval` alone does not know this one. Later
versions find it by the entry point in pyproject.toml. In Python, importing this module is enough.

Raises ImportError, in one sentence, where lm-eval is missing.
"""

from __future__ import annotations

from gptkernels.core.optional import optional

optional(
    "lm_eval",
    "the model gptkernels of lm-eval needs the package lm-eval: pip install 'gptkernels[lm-eval]'",
)

from gptkernels.gpt.evaluation.harness import HarnessModel as HarnessModel  # noqa: E402

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
