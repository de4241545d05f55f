"""Names of models on the Hugging Face hub, where a folder is wanted: nothing is downloaded here, so
the command that does it is named."""

from __future__ import annotations

import re
from pathlib import Path

# Models of the kinds that are read here, which are known without their owner's name.
_OWNERS = {
    **dict.fromkeys(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), "openai-community"),
    "openai-gpt": "openai-community",
    "distilgpt2": "distilbert",
}
# All that is read of theirs; they hold the same weights several times, for other programs.
_FILES = " config.json model.safetensors tokenizer.json"
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def hint(path: Path) -> str:
    """What to add to an error about `path`, which does not exist, where it may be a name on the
    hub: " (... hf download ...)"; else nothing."""
    name = path.as_posix()
    known = f"{_OWNERS.get(path.name)}/{path.name}"
    if name in (path.name, known) and path.name in _OWNERS:
        wanted = known + _FILES
    elif _NAME.fullmatch(name) and not path.parent.exists():
        wanted = name
    else:  # a path with an error in it
        return ""
    return (
        " (nothing is downloaded here; to get it from the Hugging Face hub: "
        f"hf download {wanted} --local-dir {path.name})"
    )
