"""The tokenizer of a run: one that has a name, or one of its own, kept in files.

    bytes, gpt1, gpt2   the name is in the checkpoint, and in the config.json of each model
    any other           its files are beside the checkpoint, and in the folder of each model; the
                        checkpoint's settings call it "own"

So a run goes on, and its models are asked, wherever the tokenizer came from and whether or not that
is still there. Files of another tokenizer, which an earlier run may have left in the same folder,
would win over a name: they are removed.
"""

from __future__ import annotations

from pathlib import Path

from gptkernels.core.files import make_folder
from gptkernels.gpt import tokenizer_files
from gptkernels.gpt.tokenizer import (
    CharacterTokenizer,
    PackageTokenizer,
    Tokenizer,
    load_tokenizer,
    name_of,
)

OWN = "own"
"""What TrainConfig.tokenizer says of a tokenizer without a name."""


def keep(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files of a tokenizer without a name into `folder`, which is made where it is not
    there; remove those of any other. Raises OSError."""
    make_folder("out", folder)
    if name_of(tokenizer) is None:
        assert isinstance(tokenizer, PackageTokenizer | CharacterTokenizer)  # there is no other
        tokenizer_files.write(folder, tokenizer)
    else:
        tokenizer_files.remove(folder)


def kept(name: str, folder: Path) -> Tokenizer:
    """The tokenizer that TrainConfig.tokenizer calls `name`, of the run in `folder`.

    Raises FileNotFoundError where its files are gone, and what `tokenizer_files.read` raises.
    """
    if name != OWN:
        return load_tokenizer(name)
    tokenizer = tokenizer_files.read_files(folder)
    if tokenizer is None:
        raise FileNotFoundError(
            f"tokenizer: {folder} has lost its own, tokenizer.json or characters.json is wanted"
        )
    return tokenizer
