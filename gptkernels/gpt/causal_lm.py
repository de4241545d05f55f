"""A GPT as a model of Hugging Face's transformers, for its Trainer, pipelines and generate().

    model = GPTForCausalLM(GPT.from_pretrained(folder))      a GPT, or a GPTConfig for a new one
    model(input_ids, labels=input_ids).loss                  labels are shifted inside
    model.generate(input_ids, attention_mask=mask)           by the engine of generation
    model.model                                              the GPT; its save_pretrained writes the
                                                             folder that GPT2LMHeadModel reads

What transformers passes is honoured or refused by name. Padding may be on the right of a row, where
no token looks; in `generate` on the left, where it is taken off. In training the logits of a call
with labels are None: they are never in memory (linear_cross_entropy).

Importing this module registers the model_type "gptkernels", so that AutoConfig and
AutoModelForCausalLM read what `save_pretrained` writes. transformers 4.57 and 5 are supported.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptkernels.core.names import hint
from gptkernels.gpt import layouts
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.config_keys import TIED
from gptkernels.gpt.generation import as_transformers
from gptkernels.gpt.model import GPT
from gptkernels.gpt.weights import are_one, json_object
from gptkernels.nn.cross_entropy import IGNORED

try:
    import transformers
    from transformers.modeling_outputs import CausalLMOutput
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import can_return_tuple
except ImportError as error:
    raise ImportError(
        "GPTForCausalLM needs the package 'transformers' (4.57 or later): pip install transformers"
    ) from error

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
# What `from_pretrained` of transformers' Auto classes is told of the hub: a folder is none.
_OF_THE_HUB = (
    *("adapter_kwargs", "cache_dir", "code_revision", "force_download", "local_files_only"),
    *("proxies", "revision", "token", "trust_remote_code"),
)


class GPTKernelsConfig(transformers.PretrainedConfig):
    """A GPTConfig as a config of transformers: each of its fields by its name, and what is in any
    config of theirs."""

    model_type = "gptkernels"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "max_position_embeddings": "block_size",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    def __init__(self, **given: Any) -> None:
        fields = {f.name: given.pop(f.name, f.default) for f in dataclasses.fields(GPTConfig)}
        for name, value in dataclasses.asdict(GPTConfig(**fields)).items():
            setattr(self, name, value)
        super().__init__(**{TIED: True, **given})

    def shape(self) -> GPTConfig:
        """The GPTConfig. Raises what it raises."""
        return GPTConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(GPTConfig)})


class GPTForCausalLM(transformers.PreTrainedModel, transformers.GenerationMixin):
    """A GPT, `model`, that transformers' Trainer, pipelines and `generate` take.

    source: a GPT, which is used, not copied; or the GPTConfig or GPTKernelsConfig of a new one with
    random weights. given: what transformers keeps in a config beside the shape, such as
    eos_token_id, which is GPT-2's for a GPT of GPT-2's vocabulary; a GPTKernelsConfig has it.

    Raises TypeError for another source, for `given` beside a GPTKernelsConfig and for one that is
    of the shape, and ValueError for a GPTKernelsConfig whose head is not tied: a new GPT's is.
    """

    config_class = GPTKernelsConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # Of the head's name, transformers 4 looks at this alone.
    _tied_weights_keys = {"model.lm_head.weight": "model.transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, source: GPT | GPTConfig | GPTKernelsConfig, **given: Any) -> None:
        if isinstance(source, GPTKernelsConfig):
            if given:
                raise TypeError(f"a GPTKernelsConfig has all settings, got {', '.join(given)}")
            if not source.tie_word_embeddings:
                raise ValueError(f"{TIED} must be true for a new GPT, got false")
            network, config = GPT(source.shape()), source
        elif not isinstance(source, GPT | GPTConfig):
            raise TypeError(
                "source must be a GPT, a GPTConfig or a GPTKernelsConfig, got a "
                f"{type(source).__name__}; GPT.from_pretrained makes a GPT of others' models"
            )
        else:
            _check_no_shape(given)
            network = source if isinstance(source, GPT) else GPT(source)
            end = layouts.end_of_text(network.config)
            tied = are_one(network.lm_head.weight, network.transformer.wte.weight)
            given = {"bos_token_id": end, "eos_token_id": end, **given, TIED: tied}
            config = GPTKernelsConfig(**dataclasses.asdict(network.config), **given)
        super().__init__(config)
        self.model = network
        self.gradient_checkpointing = False
        self.post_init()
        self.train(network.training)

    def init_weights(self) -> None:
        """Nothing: a GPT has its weights, random or not, and its head is tied or not."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int | Tensor = 0,
        **others: Any,
    ) -> Any:
        """Logits of the next tokens and, with labels, the loss: a CausalLMOutput.

        input_ids: (B, T) int64. attention_mask: (B, T), 0 where a row is padded, on its right.
        labels: (B, T) int64, the tokens themselves: the one at t + 1 is what t has to predict; -100
        does not count. num_items_in_batch: the loss is the sum divided by it, not the mean over
        the labels that count. logits_to_keep: the logits of so many last tokens, 0: of all; or of
        those places.

        logits: (B, T, V); None in training with labels. Raises NotImplementedError for any other
        argument of transformers' models (past_key_values, position_ids, inputs_embeds, ...),
        ValueError for padding elsewhere and for a label that only padding could predict, and what
        `gptkernels.GPT` raises.
        """
        _refuse("forward", others)
        targets = None if labels is None else _targets(labels, input_ids)
        if attention_mask is not None:
            _check_padding(attention_mask, input_ids, targets)
        hidden = self.model.hidden_states(input_ids)
        loss = logits = None
        if targets is not None:
            loss = self._loss(hidden, targets, num_items_in_batch)
        if targets is None or not self.training:
            kept = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            logits = self.model.logits(hidden[:, kept])
        return CausalLMOutput(loss=loss, logits=logits)

    def _loss(self, hidden: Tensor, targets: Tensor, items: Tensor | int | None) -> Tensor:
        if items is None:
            return self.model.loss(hidden, targets)
        return self.model.loss(hidden, targets, "sum") / items

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        streamer: Any = None,
        **given: Any,
    ) -> Tensor:
        """inputs, or input_ids, (B, T) int64, with what the model writes behind them: (B * n,
        T + new) int64, as transformers' `generate` returns it, from the package's own engine.

        Settings come from the arguments, the generation_config and the model's own one, in this
        order: those that gptkernels/gpt/generation/as_transformers.py lists. torch.manual_seed
        gives the same samples again, which are not transformers'. Raises NotImplementedError for
        any other setting, and ValueError for one out of range.
        """
        prompts = [x for x in (inputs, given.pop("input_ids", None)) if x is not None]
        if not prompts:
            raise ValueError("generate continues input_ids of at least one token, got none")
        if len(prompts) > 1:
            raise ValueError("inputs and input_ids are the same argument, got both")
        mask = given.pop("attention_mask", None)
        settings: dict[str, Any] = {}
        unset = transformers.GenerationConfig().to_dict()
        for config in (self.generation_config, generation_config):
            of_config = {} if config is None else config.to_dict()
            settings |= {k: v for k, v in of_config.items() if v is not None and v != unset.get(k)}
        settings |= given
        _refuse("generate", settings, as_transformers.KNOWN, _NEUTRAL)
        return as_transformers.generate(self.model, prompts[0], mask, settings, streamer)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | Path,
        *,
        config: GPTKernelsConfig | None = None,
        dtype: torch.dtype | str | None = None,
        dropout: float | None = None,
        **others: Any,
    ) -> GPTForCausalLM:
        """The model in a folder of this class's `save_pretrained`, or in any that
        `GPT.from_pretrained` reads, on the CPU, in evaluation mode.

        config: as AutoModelForCausalLM passes it: of the folder, perhaps with another dropout.
        dtype: of all weights; None and "auto" keep the folder's. dropout: in place of the folder's.
        Raises what `GPT.from_pretrained` raises, and NotImplementedError for any other option of
        transformers' `from_pretrained` (device_map, quantization_config, ...).
        """
        dtype = others.pop("torch_dtype", None) if dtype is None else dtype
        _refuse("from_pretrained", others, _OF_THE_HUB)
        wanted = None if dtype in (None, "auto") else _dtype(dtype)
        path = Path(folder)
        if config is not None and dropout is None:
            dropout = config.dropout
        network = GPT.from_pretrained(path, dropout=dropout)
        if config is not None and config.shape() != network.config:
            raise ValueError(f"config must be that of {folder}, got {config.shape()}")
        if wanted is not None:
            network.to(wanted)
        said = json_object(path / "config.json") if path.is_dir() else {}
        model = cls(network, **{key: said[key] for key in _SPECIAL if key in said})
        if (path / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(path)
        return model.eval()

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Any = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        options = getattr(gradient_checkpointing_func, "keywords", {})
        function = getattr(gradient_checkpointing_func, "func", gradient_checkpointing_func)
        # Reentrant or not, the results are the same.
        if function is not checkpoint or every_n_layers != 1 or options.keys() - {"use_reentrant"}:
            raise NotImplementedError(
                "GPTForCausalLM recomputes every block, without options of its own: leave out "
                "every_n_layers, offload and the like"
            )
        self.gradient_checkpointing = enable
        self.model.set_recompute("block" if enable else "none")

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """As transformers' own: the embedding and the head get other numbers of tokens."""
        embedding = super().resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        size = self.config.vocab_size
        self.model.config = dataclasses.replace(self.model.config, vocab_size=size)
        return embedding

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens."""
        return self.model.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Exchange the embedding of tokens."""
        self.model.transformer.wte = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.model.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Exchange the head."""
        self.model.lm_head = value


def _refuse(
    what: str,
    given: Mapping[str, Any],
    known: Collection[str] = (),
    neutral: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Raise NotImplementedError for the first argument that is not known and asks for something."""
    for name, value in given.items():
        silent = value is None or value is False or name.startswith("_")
        if not silent and name not in known and (name not in neutral or value != neutral[name]):
            own = inspect.signature(getattr(GPTForCausalLM, what)).parameters
            nearest = hint(name, [*known, *own])
            raise NotImplementedError(f"GPTForCausalLM.{what} has no {name}{nearest}")


def _check_no_shape(given: Mapping[str, Any]) -> None:
    """Raise TypeError for the first setting that says what the GPT's own config says."""
    shape = {f.name for f in dataclasses.fields(GPTConfig)} | {TIED}
    for name in given:
        if GPTKernelsConfig.attribute_map.get(name, name) in shape:
            raise TypeError(f"{name} is what the source says, and cannot be given beside it")


def _dtype(given: Any) -> torch.dtype:
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype must be 'auto' or a dtype of PyTorch, got {given!r}")
    return found


def _targets(labels: Tensor, tokens: Tensor) -> Tensor:
    """What each place has to predict: the label behind it."""
    if labels.shape != tokens.shape:
        raise ValueError(
            f"labels must have the shape of input_ids, {tuple(tokens.shape)}, "
            f"got {tuple(labels.shape)}"
        )
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


@torch.compiler.disable  # it reads values
def _check_padding(mask: Tensor, tokens: Tensor, targets: Tensor | None) -> None:
    """Raise ValueError where padding would be looked at, or has to predict something."""
    as_transformers.check_mask(mask, tokens)
    if not as_transformers.padded_right(mask):
        raise ValueError(
            "padding must be on the right of each row (tokenizer.padding_side = 'right'); generate "
            "takes it on the left"
        )
    if targets is not None and bool(((targets != IGNORED) & (mask == 0)).any()):
        raise ValueError("labels must be -100 behind tokens that attention_mask hides")


# What transformers assumes of generate's settings where nothing is said.
_NEUTRAL = {
    **transformers.GenerationConfig().to_dict(),
    **getattr(transformers.GenerationConfig, "_get_default_generation_params", dict)(),
}
transformers.AutoConfig.register(GPTKernelsConfig.model_type, GPTKernelsConfig)
transformers.AutoModelForCausalLM.register(GPTKernelsConfig, GPTForCausalLM)
# By the class's name Trainer knows that it has to shift labels where it smooths them itself.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[GPTKernelsConfig.model_type] = GPTForCausalLM.__name__
