"""Hugging Face folders: config.json beside model.safetensors, to and from a GPT's state_dict.

    theirs                                          ours
    transformer.* or the bare names                 transformer.*
    tokens_embed, positions_embed (GPT-1)           wte, wpe
    h.N.{attn,mlp}.c_*.weight (in, out), x @ W      transposed: nn.Linear stores (out, in)
    lm_head.weight or wte.weight, or both           one parameter, or two where the head is untied
    h.N.attn.bias, h.N.attn.masked_bias             causal masks of old checkpoints: ignored
    n_averaged                                      a count of AveragedModel's: ignored
    _orig_mod, module, base_model.model, ...        names of wrappers, anywhere: taken off

Read: model.safetensors, its shards with model.safetensors.index.json, or pytorch_model.bin (sharded
too), from which only tensors are unpickled (weights_only=True). Written: config.json and one
model.safetensors. layouts.py says what config.json holds. A GPT-2 without biases is written with
biases of zero, which every reader of the layout understands, and with "bias": false in config.json,
which tells this module to drop them again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gptkernels.core.checks import check_same_dtype, check_tensor
from gptkernels.core.files import WINDOWS, check_no_pointer, make_folder, replacing
from gptkernels.core.optional import optional
from gptkernels.gpt import hub, layouts
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.config_keys import TOKENIZER

# Causal masks, and how many models torch.optim.swa_utils.AveragedModel has averaged.
_IGNORED = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)|n_averaged")
_TRANSPOSED = re.compile(
    r"transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight"
)
_HEAD, _EMBEDDING = "lm_head.weight", "transformer.wte.weight"
# What torch.compile, data parallelism, FSDP, activation checkpointing, peft, DeepSpeed and
# Lightning put before names of modules. No part of a GPT has such a name.
_WRAPPERS = re.compile(
    r"(^|(?<=\.))(_orig_mod|module|base_model\.model|model|_fsdp_wrapped_module"
    r"|_checkpoint_wrapped_module|_forward_module)\."
)


class Found(NamedTuple):
    """A GPT as others keep it.

    config: its shape. tied: whether its head is the embedding. state: reads the state_dict, which
    has to have exactly the names and shapes that it is given.
    """

    config: GPTConfig
    tied: bool
    state: Callable[[Mapping[str, torch.Size]], dict[str, Tensor]]


def read(folder: Path, dropout: float | None = None) -> Found:
    """The model in `folder`; `dropout` replaces the folder's three.

    Raises FileNotFoundError for what is missing, ValueError for what is broken or asks for another
    model; reading the state also for what contradicts the configuration.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"folder must be an existing folder, got {folder}{hub.hint(folder)}"
        )
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json): merge it into its model first"
        )
    path = folder / "config.json"
    given = json_object(path)
    config, tied = layouts.read(path, given, dropout)
    layout = layouts.of_file(path, given)

    def state(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        found = converted(folder, layout, _tensors(folder), shapes, config, tied)
        return {name: tensor.contiguous() for name, tensor in found.items()}

    return Found(config, tied, state)


def converted(
    source: Path | str,
    layout: layouts.Layout,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    config: GPTConfig,
    tied: bool,
) -> dict[str, Tensor]:
    """The state_dict of a model of this `config`, in this `layout`: `tensors`, or views of them.

    Raises ValueError, naming the `source`, for what contradicts `shapes`.
    """
    state = unwrapped(source, tensors, lambda name: layouts.our_name(layout, name))
    state = {
        name: tensor.t() if _transposes(layout, name, tensor) else tensor
        for name, tensor in state.items()
    }
    if layout.has_biases and not config.bias:
        _drop_zero_biases(source, state)
    return checked(source, state, shapes, tied)


def unwrapped(
    source: Path | str, tensors: Mapping[str, Tensor], name_here: Callable[[str], str] = str
) -> dict[str, Tensor]:
    """`tensors` by the names they have here, without those of wrappers and without what is ignored.

    Raises ValueError, naming the `source`, for two names of one parameter, and for a tensor that is
    sparse, has a shape alone, or is of a class of its own (sharded, quantised).
    """
    stored: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_meta:
            kind = "without numbers" if tensor.is_meta else str(tensor.layout)
            raise ValueError(f"{source}: {name} must be a dense tensor, got one {kind}")
        if type(tensor) not in (Tensor, nn.Parameter):
            raise ValueError(
                f"{source}: {name} must be a plain tensor, got a {type(tensor).__name__}"
            )
        ours = name_here(_WRAPPERS.sub("", name))
        if stored.setdefault(ours, name) != name:
            raise ValueError(
                f"{source}: the weights hold {ours} twice, as {stored[ours]} and {name}"
            )
    return {ours: tensors[name] for ours, name in stored.items() if not _IGNORED.fullmatch(ours)}


def checked(
    source: Path | str,
    state: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    tied: bool = True,
) -> dict[str, Tensor]:
    """`state` of exactly these names and shapes. A `tied` head and the embedding are one tensor.

    Raises ValueError, naming the `source`, for what contradicts `shapes`.
    """
    state = _with_tied_head(source, state) if tied else dict(state)
    _check_shapes(source, shapes, state)
    try:
        _check_dtypes(state)
    except TypeError as error:
        raise ValueError(f"{source}: {error}") from None
    return state


def read_tokenizer(folder: Path) -> str | None:
    """The name of the tokenizer that `write_folder` was given; None where config.json has none.

    Raises FileNotFoundError without a config.json, ValueError for a broken one.
    """
    name = json_object(folder / "config.json").get(TOKENIZER)
    if name is not None and not isinstance(name, str):
        raise ValueError(f"{folder / 'config.json'}: {TOKENIZER} must be a name, got {name!r}")
    return name


def write_folder(
    folder: Path,
    config: GPTConfig,
    state: dict[str, Tensor],
    shapes: Mapping[str, torch.Size],
    tokenizer: str | None = None,
) -> None:
    """Write config.json and model.safetensors; each is complete before it gets its name.

    The name of a `tokenizer` is kept in config.json. Raises TypeError for dtypes and ValueError for
    names and shapes that would not be read back, OSError where the folder cannot be written.
    """
    package = safetensors_package()
    _check_shapes("the model", shapes, state)
    _check_dtypes(state)
    layout = layouts.of_config(config)
    tied = are_one(state[_HEAD], state[_EMBEDDING])
    state = {name: tensor.detach() for name, tensor in state.items() if name != _HEAD or not tied}
    if layout.has_biases and not config.bias:
        for name, like in [(n, t) for n, t in state.items() if n.endswith(".weight")]:
            if not name.startswith(("transformer.wte", "transformer.wpe", "lm_head")):
                state[name.removesuffix("weight") + "bias"] = like.new_zeros(like.shape[0])
    tensors = {
        layouts.their_name(layout, name): (
            tensor.t() if _transposes(layout, name, tensor) else tensor
        ).contiguous()
        for name, tensor in state.items()
    }
    named = {} if tokenizer is None else {TOKENIZER: tokenizer}
    text = json.dumps({**layouts.write(layout, config, tied), **named}, indent=2) + "\n"

    make_folder("folder", folder)
    path = folder / "model.safetensors"
    with (
        replacing(folder / "config.json", durable=True) as new_config,
        replacing(path, durable=True) as new_tensors,
    ):
        new_config.write_text(text, encoding="utf-8")
        try:
            package.torch.save_file(tensors, new_tensors, metadata={"format": "pt"})
        except package.SafetensorError as error:
            raise OSError(f"{path} cannot be written ({error})") from None
        # safetensors makes its files private, whatever the umask.
        new_tensors.chmod(new_config.stat().st_mode)


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor in the folder by the name it is stored under."""
    for name, read in (
        ("model.safetensors", _read_safetensors),
        ("pytorch_model.bin", _read_pickle),
    ):
        if (folder / name).is_file():
            return read(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(index, read)
    raise FileNotFoundError(
        f"{folder} must hold model.safetensors, its shards with their index, or pytorch_model.bin"
    )


def _read_shards(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    places = json_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise ValueError(f"{index}: weight_map must name a file for each tensor")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:
            raise ValueError(
                f"{index}: weight_map must name files in the folder itself, got {shard!r}"
            )
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index} names the file {shard}, which is missing")
        tensors |= read(index.parent / shard)
    for name, shard in places.items():
        if name not in tensors:
            raise ValueError(f"{index} places {name} in {shard}, which does not hold it")
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    package = safetensors_package()
    check_no_pointer(path)
    try:
        tensors = package.torch.load_file(path)
    except package.SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error})") from None
    # They are mapped from the file, and Windows replaces no mapped file: nothing could be saved
    # over a model that is in use.
    return {name: t.clone() for name, t in tensors.items()} if WINDOWS else tensors


def unpickle(path: Path) -> Any:
    """What torch.save wrote: only tensors and plain values. ValueError for anything else."""
    check_no_pointer(path)
    try:
        # weights_only: a pickle may otherwise run any code it likes.
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # broken bytes make the unpickler raise nearly anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path} is not a complete PyTorch file of tensors alone ({reason})"
        ) from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    loaded = unpickle(path)
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in loaded.items()
    ):
        raise ValueError(f"{path} must hold a dictionary of tensors by name")
    return loaded


def _transposes(layout: layouts.Layout, name: str, tensor: Tensor) -> bool:
    return layout.transposed and _TRANSPOSED.fullmatch(name) is not None and tensor.dim() == 2


def are_one(head: Tensor, embedding: Tensor) -> bool:
    """Whether the head computes what a tied one does: the same memory, or the same numbers."""
    return head.is_set_to(embedding) or torch.equal(head, embedding)


def _with_tied_head(source: Path | str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with one tensor as head and embedding, of which it may lack either."""
    stored = [state[name] for name in (_EMBEDDING, _HEAD) if name in state]
    if not stored:
        raise ValueError(f"{source}: the weights lack {_EMBEDDING}")
    if not are_one(stored[-1], stored[0]):
        raise ValueError(f"{source}: {_HEAD} must equal {_EMBEDDING}, because the head is tied")
    return {**state, _EMBEDDING: stored[0], _HEAD: stored[0]}


def _drop_zero_biases(source: Path | str, state: dict[str, Tensor]) -> None:
    for name in [name for name in state if name.endswith(".bias")]:
        if state.pop(name).count_nonzero():
            raise ValueError(f'{source}: its config says "bias": false, but {name} is not zero')


def _check_shapes(
    source: Path | str, shapes: Mapping[str, torch.Size], state: Mapping[str, Tensor]
) -> None:
    """Raise ValueError unless names and shapes are the described model's."""
    for name in state:
        if ".lora_" in name:
            raise ValueError(
                f"{source}: the weights hold {name}, a part of an adapter: merge it into its "
                "model first"
            )
    for name, shape in shapes.items():
        if name not in state:
            raise ValueError(f"{source}: the weights lack {name}, which its configuration asks for")
        tensor = state[name]
        if tensor.shape != shape:
            raise ValueError(
                f"{source}: {name} must have shape {tuple(shape)} by its configuration, "
                f"got {tuple(tensor.shape)}"
            )
    unknown = sorted(state.keys() - shapes.keys())
    if unknown:
        raise ValueError(
            f"{source}: the weights hold {unknown[0]}, which its configuration does not ask for"
        )


def _check_dtypes(state: Mapping[str, Tensor]) -> None:
    """One dtype for linear layers and embeddings, one for LayerNorms. Raises TypeError.

    The two may differ, as in models that keep their norms in fp32.
    """
    first: dict[bool, str] = {}
    for name, tensor in state.items():
        check_tensor(name, tensor)
        other = first.setdefault(".ln_" in name, name)
        check_same_dtype(name, tensor, other, state[other])


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError and ValueError, in one sentence."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    check_no_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # with a byte order mark or not
    except ValueError as error:  # JSON's own and UTF-8's errors are both ValueErrors
        raise ValueError(f"{path} is not a JSON file ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def safetensors_package() -> Any:
    """The package safetensors. Raises ImportError, in one sentence, when it is missing."""
    missing = (
        "reading and writing weights needs the package 'safetensors': pip install 'gptkernels[gpt]'"
    )
    optional("safetensors.torch", missing)
    return optional("safetensors", missing)
