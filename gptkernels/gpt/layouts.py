"""What config.json says about a GPT, in the three kinds of folder that are read and written.

model_type     written for                               read by others as
gpt2           norm="pre" without a window               GPT2LMHeadModel
openai-gpt     norm="post", as GPT-1 has it              OpenAIGPTLMHeadModel
gptkernels     all else, such as GPT-3's banded layers   nothing: they refuse the model_type
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.config_keys import TIED, settle


@dataclass(frozen=True)
class Layout:
    """How one kind of folder describes a GPT and names its parts.

    Fields:
        model_type: what config.json calls it.
        architecture: the class of transformers that reads it.
        activation_key, activations: the activation's key, and `approximate` for each of its values.
        defaults: the keys that describe the model, and what that class assumes for each that is
            left out.
        renamed: names of modules, theirs and ours.
        transposed: whether the weights of linear layers are stored transposed.
        has_biases: whether biases are stored even where the model has none, as zeros.
    """

    model_type: str
    architecture: str
    activation_key: str = ""
    activations: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()
    transposed: bool = True
    has_biases: bool = True


_SHARED_DEFAULTS: dict[str, Any] = {
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "layer_norm_epsilon": 1e-5,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "resid_pdrop": 0.1,
}
_GPT2 = Layout(
    "gpt2",
    "GPT2LMHeadModel",
    activation_key="activation_function",
    activations={
        **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh"), "tanh"),
        **dict.fromkeys(("gelu_fast", "gelu_accurate"), "tanh"),
        **dict.fromkeys(("gelu", "gelu_python"), "none"),
    },
    defaults={
        **_SHARED_DEFAULTS,
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_inner": None,
        "activation_function": "gelu_new",
        "bias": True,
    },
)
_GPT1 = Layout(
    "openai-gpt",
    "OpenAIGPTLMHeadModel",
    activation_key="afn",
    activations={"gelu": "tanh"},  # its "gelu" is the tanh form
    defaults={**_SHARED_DEFAULTS, "vocab_size": 40478, "n_positions": 512, "afn": "gelu"},
    renamed=(("tokens_embed", "wte"), ("positions_embed", "wpe")),
)
_OURS = Layout("gptkernels", "GPT", transposed=False, has_biases=False)
_LAYOUTS = {layout.model_type: layout for layout in (_GPT2, _GPT1, _OURS)}

# Keys that every layout of transformers has, and the fields that they describe.
_FIELDS = {
    "vocab_size": "vocab_size",
    "n_positions": "block_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "layer_norm_epsilon": "layer_norm_eps",
}
_BARE = ("wte.", "wpe.", "h.", "ln_f.", "tokens_embed.", "positions_embed.")
_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
_GPT2_VOCAB, _GPT2_END = 50257, 50256


def of_file(source: Path | str, given: dict[str, Any]) -> Layout:
    """The layout that a config.json names; `source` says where it is. Raises ValueError for any
    other."""
    kind = given.get("model_type", "gpt2")
    if not isinstance(kind, str) or kind not in _LAYOUTS:
        names = ", ".join(map(repr, _LAYOUTS))
        raise ValueError(f"{source}: model_type must be one of {names}, got {kind!r}")
    return _LAYOUTS[kind]


def of_config(config: GPTConfig) -> Layout:
    """The layout that a model of this configuration is written in."""
    if config.window is None and config.norm == "pre":
        return _GPT2
    as_gpt1 = (config.bias, config.d_inner, config.approximate) == (True, 4 * config.n_embd, "tanh")
    return _GPT1 if config.window is None and as_gpt1 else _OURS


def our_name(layout: Layout, name: str) -> str:
    """The name here of a tensor in a file, where the decoder's may be bare; that of any other
    tensor is the same."""
    if name.startswith(_BARE):
        name = f"transformer.{name}"
    for theirs, ours in layout.renamed:
        name = name.replace(f"transformer.{theirs}.", f"transformer.{ours}.")
    return name


def their_name(layout: Layout, name: str) -> str:
    """The reverse of `our_name`."""
    for theirs, ours in layout.renamed:
        name = name.replace(f"transformer.{ours}.", f"transformer.{theirs}.")
    return name


def read(
    source: Path | str, given: dict[str, Any], dropout: float | None = None
) -> tuple[GPTConfig, bool]:
    """The configuration that a config.json describes, and whether the head is tied; `source` says
    where it is, `dropout` replaces its three.

    Raises ValueError, in one sentence, for a setting that a GPT does not have.
    """
    layout = of_file(source, given)
    used = (f.name for f in dataclasses.fields(GPTConfig)) if layout is _OURS else layout.defaults
    try:
        settled = settle(given, used)
        tied = settled.pop(TIED)
        if layout is _OURS:
            return _read_ours(settled, dropout), tied
        return GPTConfig(**_fields(layout, settled, dropout)), tied
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None


def write(layout: Layout, config: GPTConfig, tied: bool) -> dict[str, Any]:
    """The content of config.json for a model of this configuration, its head `tied` or not."""
    head = {"architectures": [layout.architecture], "model_type": layout.model_type, TIED: tied}
    if layout is _OURS:
        return {**head, **dataclasses.asdict(config)}
    names = {approximate: name for name, approximate in reversed(layout.activations.items())}
    written = {
        **head,
        **{theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()},
        layout.activation_key: names[config.approximate],
        **dict.fromkeys(_DROPOUTS, config.dropout),
    }
    if layout is _GPT2:
        end = end_of_text(config)
        written |= {
            "n_inner": config.n_inner,
            "bos_token_id": end,
            "eos_token_id": end,
            "reorder_and_upcast_attn": False,
        }
    return written if config.bias else {**written, "bias": False}


def end_of_text(config: GPTConfig) -> int | None:
    """The id of GPT-2's end of text, where the vocabulary has GPT-2's size."""
    return _GPT2_END if config.vocab_size == _GPT2_VOCAB else None


def _read_ours(given: dict[str, Any], dropout: float | None) -> GPTConfig:
    names = {f.name for f in dataclasses.fields(GPTConfig)}
    missing = sorted(names - given.keys())
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given")
    config = GPTConfig(**given)
    return config if dropout is None else dataclasses.replace(config, dropout=dropout)


def _fields(layout: Layout, given: dict[str, Any], dropout: float | None) -> dict[str, Any]:
    values = {**layout.defaults, **given}
    activation = values[layout.activation_key]
    if not isinstance(activation, str) or activation not in layout.activations:
        raise ValueError(
            f"{layout.activation_key} must be one of {', '.join(layout.activations)}, "
            f"got {activation!r}"
        )
    dropouts = [values[key] for key in _DROPOUTS]
    if dropout is None:
        dropout = dropouts[0]
        if dropouts != [dropout] * 3:
            raise ValueError(
                f"embd_pdrop, attn_pdrop and resid_pdrop must be equal, got {dropouts[0]}, "
                f"{dropouts[1]} and {dropouts[2]} (pass dropout= to replace them)"
            )
    return {
        **{ours: values[theirs] for theirs, ours in _FIELDS.items()},
        "n_inner": values.get("n_inner"),
        "approximate": layout.activations[activation],
        "dropout": dropout,
        "bias": values.get("bias", True),
        "norm": "post" if layout is _GPT1 else "pre",
    }
