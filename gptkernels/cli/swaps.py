"""`gptkernels info FOLDER`: what `gptkernels.accelerate` would do to the model in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gptkernels.core.optional import optional
from gptkernels.dropin.accelerate import accelerate
from gptkernels.dropin.report import Report


def report_of(folder: Path) -> Report:
    """Of the Hugging Face model that config.json in `folder` describes; no weights are read.

    Raises ImportError without transformers, FileNotFoundError where there is no config.json, and
    ValueError for a model that transformers does not know, and for one with nothing to swap.
    """
    transformers: Any = optional(
        "transformers", "info FOLDER needs transformers: pip install transformers"
    )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"transformers does not know the model that {folder / 'config.json'} describes"
        ) from error
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    with torch.device("meta"):
        if named and named[0] is not None:
            model = named[0](config)
        else:
            model = transformers.AutoModel.from_config(config)
    return accelerate(model)
