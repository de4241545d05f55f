"""GPT-1, GPT-2 and GPT-3 on the fused ops: the whole model, to be read in one sitting.

    x = wte[tokens] + wpe[positions]
    GPT-2, GPT-3    for each block:   x = x + attention(LN(x));   x = x + mlp(LN(x))
                    logits = LN(x) @ wte^T
    GPT-1           for each block:   x = LN(x + attention(x));   x = LN(x + mlp(x))
                    logits = x @ wte^T

GPT-3 is GPT-2 with banded attention in every other block. Every residual add, the dropout on what
is added, and the LayerNorm that follows are one op. So a block of GPT-2 does not return x. It
returns the pair (branch, stream), of which x is the sum: the next LayerNorm adds the two, even if
it belongs to the next block. An add and its norm together read the stream (B * T * C elements) once
and write it once. In GPT-1 an add and its norm are in the same block.

B batch, T tokens, C width (n_embd), V vocabulary. Radford et al., "Improving Language Understanding
by Generative Pre-Training", 2018; Radford et al., "Language Models are Unsupervised Multitask
Learners", 2019; Brown et al., "Language Models are Few-Shot Learners", 2020. The parameters have
nanoGPT's names, so its checkpoints load.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Never, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device
from torch.utils.checkpoint import checkpoint

from gptkernels.core.checks import dtype_name
from gptkernels.core.keywords import refuse, without_unknown
from gptkernels.core.names import check_name
from gptkernels.core.values import readable
from gptkernels.gpt import in_memory, nanogpt, weights
from gptkernels.gpt.cached_blocks import cached_blocks
from gptkernels.gpt.config import GPTConfig
from gptkernels.gpt.embedding import Embedding
from gptkernels.gpt.generation.cache import SlotCache
from gptkernels.gpt.generation.generate import generate
from gptkernels.nn.cross_entropy import IGNORED, call_cross_entropy
from gptkernels.nn.layers import (
    MLP,
    CausalSelfAttention,
    KVCache,
    LayerNorm,
    Normed,
    add_norm,
    set_impl,
)
from gptkernels.nn.linear import call_linear
from gptkernels.nn.plain import remember

_INIT_STD = 0.02
RECOMPUTE = ("none", "mlp", "block")
# What transformers' from_pretrained has, and GPT's has not.
_CAST = "a folder's dtype is kept, and .to(dtype) casts the GPT"
_MOVED = "a folder is read on the CPU, and .to(device) moves the GPT"
_ELSEWHERE = {"dtype": _CAST, "torch_dtype": _CAST, "device": _MOVED, "device_map": _MOVED}


class _Block(nn.Module):
    """One attention, one MLP, two LayerNorms: block number `index` of a decoder."""

    def __init__(self, config: GPTConfig, index: int, **made: Any) -> None:
        super().__init__()
        made["bias"] = config.bias
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_eps, **made)
        self.attn = CausalSelfAttention(
            config.n_embd,
            config.n_head,
            dropout=config.dropout,
            window=config.window_of(index),
            **made,
        )
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_eps, **made)
        self.mlp = MLP(config.n_embd, config.d_inner, approximate=config.approximate, **made)
        self.dropout = config.dropout


@remember
class PreNormBlock(_Block):
    """GPT-2's block: each LayerNorm first adds the branch before it to the stream."""

    def forward(
        self, branch: Tensor, stream: Tensor | None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """(branch, stream), both (B, T, C) -> the next pair. The first block gets no stream."""
        dropout = self.dropout if self.training else 0.0
        normed = add_norm(self.ln_1, branch, stream, dropout)
        attended = self.attn(normed.y, cache, normed=normed)
        normed = add_norm(self.ln_2, attended, normed.s, dropout)
        return self.mlp(normed.y), normed.s


@remember
class PostNormBlock(_Block):
    """GPT-1's block: each LayerNorm adds the branch before it to x."""

    def forward(
        self, x: Tensor, normed: Normed | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, Normed]:
        """x (B, T, C) -> the next x, and what norm it is the output of. `normed` says that of x."""
        dropout = self.dropout if self.training else 0.0
        attended = self.attn(x, cache, normed=normed)
        # Under autocast the branch is narrow; widened, it leaves the next x as wide as x.
        x = add_norm(self.ln_1, attended.to(x.dtype), x, dropout).y
        normed = add_norm(self.ln_2, self.mlp(x).to(x.dtype), x, dropout)
        return normed.y, normed


class Decoder(nn.Module):
    """Everything below the head: the embeddings, the blocks, GPT-2's final LayerNorm."""

    def __init__(self, config: GPTConfig, **made: Any) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.n_embd, **made)
        self.wpe = nn.Embedding(config.block_size, config.n_embd, **made)
        block = PreNormBlock if config.norm == "pre" else PostNormBlock
        self.h = nn.ModuleList(block(config, i, **made) for i in range(config.n_layer))
        self.ln_f = None
        if config.norm == "pre":
            self.ln_f = LayerNorm(config.n_embd, config.layer_norm_eps, bias=config.bias, **made)
        self.dropout = config.dropout
        self.recompute_blocks = False

    def forward(self, tokens: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """tokens (B, T) int64 -> (B, T, C). `caches`, one for each block, say where tokens go."""
        if caches is not None and caches[0].places is not None:
            _, positions = caches[0].places
        else:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        embedded = self.wte(tokens) + self.wpe(positions)
        if caches is not None and not (self.training and self.dropout):
            kind = PostNormBlock if self.ln_f is None else PreNormBlock
            found = cached_blocks(self.h, self.ln_f, embedded, caches, kind)
            if found is not None:
                return found
        of_blocks = [None] * len(self.h) if caches is None else caches
        if self.ln_f is None:
            x, normed = F.dropout(embedded, self.dropout, self.training), None
            for block, cache in zip(self.h, of_blocks, strict=True):
                x, normed = self._run(block, x, normed, cache)
                if self.recompute_blocks:  # x, the next block's input, is kept anyway
                    normed = None
            return x
        # The first LayerNorm applies the embedding's dropout and starts the stream.
        branch, stream = embedded, None
        for block, cache in zip(self.h, of_blocks, strict=True):
            branch, stream = self._run(block, branch, stream, cache)
        return add_norm(self.ln_f, branch, stream, self.dropout if self.training else 0.0).y

    def _run(self, block: nn.Module, *arguments: Any) -> Any:
        if self.recompute_blocks and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)


class GPT(nn.Module):
    """A GPT. Its head is tied: lm_head.weight is transformer.wte.weight.

    `GPT(config)` has the papers' random initial weights, made on `device` in `dtype`.
    `GPT.from_pretrained(folder)` loads a Hugging Face folder, and takes a model of transformers as
    well. Their heads may be untied: a parameter of its own.
    """

    def __init__(
        self, config: GPTConfig, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        made: Any = {"device": device, "dtype": dtype}
        self.transformer = Decoder(config, **made)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False, **made)
        self.tie_head()
        self._init_weights()

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        cache: SlotCache | None = None,
        slot: int | None = None,
    ) -> Tensor:
        """Logits of the next token, or with targets the loss.

        tokens: (B, T) int64, T at most block_size. targets: (B, T) int64; -100 marks a position
        that does not count.
        cache: stores the keys and values. Row b of tokens continues what slot b holds. With `slot`,
        tokens has one row, which replaces what this slot holds. RuntimeError where gradients are
        tracked.

        Returns logits (B, T, V); or the mean cross-entropy over the targets that count, a fp32
        scalar. Raises TypeError for tokens or targets that are not int64, and ValueError for a
        wrong shape, a T past block_size or past what the cache has room for, or, on a CPU, an id
        outside 0...vocab_size - 1.
        """
        hidden = self.hidden_states(tokens, cache=cache, slot=slot)
        if targets is None:
            return self.logits(hidden)
        self._check_targets(targets, tokens)
        return self.loss(hidden, targets)

    def hidden_states(
        self, tokens: Tensor, *, cache: SlotCache | None = None, slot: int | None = None
    ) -> Tensor:
        """What the head reads, (B, T, C). Arguments and errors are those of `forward`."""
        if cache is None:
            self.check_tokens(tokens)
            return self.transformer(tokens)
        self._check_cache(cache, slot, tokens)
        caches = cache.caches(tokens.shape[1], slot)
        hidden = self.transformer(tokens, caches)
        cache.keep(caches, slot)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) to logits (..., V), by the implementation of the first block's
        attention."""
        return call_linear(self.lm_head, hidden, self._head_impl())

    def loss(self, hidden: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """The mean or, with reduction="sum", the sum of the cross-entropy, a fp32 scalar, of hidden
        states (..., C) and the tokens (...) that follow them; -100 marks a position that does not
        count."""
        return call_cross_entropy(self.lm_head, hidden, targets, self._head_impl(), reduction)

    def _head_impl(self) -> str:
        attention = getattr(self.transformer.h[0], "attn", None)
        impl: str = getattr(attention, "impl", "auto")
        return impl

    # model.generate(tokens, max_new_tokens, ...): the function's first argument is the model.
    generate = generate

    @classmethod
    @without_unknown
    def from_pretrained(
        cls, source: str | Path | nn.Module, *, dropout: float | None = None, **unknown: Never
    ) -> GPT:
        """The GPT in a Hugging Face folder, in a checkpoint file of nanoGPT (ckpt.pt), or in
        memory, in its dtype, in evaluation mode; from files on the CPU.

        A model in memory, on whose device the GPT will be, is one of transformers (GPT2LMHeadModel,
        GPT2Model, OpenAIGPTLMHeadModel, OpenAIGPTModel) or nanoGPT's, perhaps compiled, wrapped or
        accelerated. It stays as it is: its weights are copied. Hooks and exchanged modules are not
        seen.

        Of a folder, reads config.json (model_type "gpt2", "openai-gpt", or "gptkernels", see
        `save_pretrained`) and model.safetensors (or its shards, or pytorch_model.bin with
        weights_only=True). Names that wrappers put before those of parameters (_orig_mod, module,
        base_model.model, ...) are taken off. The config's three dropout probabilities must be
        equal, unless `dropout` replaces them. With "tie_word_embeddings": false the head is a
        parameter of its own.
        Raises FileNotFoundError for a missing file (nothing is downloaded) and ValueError, in one
        sentence, for one that is broken, foreign, contradicted by the others, or asks for something
        this model does not have; so for a model, and TypeError for a module that is none of these.
        """
        if unknown:
            refuse(GPT.from_pretrained, unknown, _ELSEWHERE)
        if isinstance(source, nn.Module):
            found = in_memory.read(source, dropout)
        else:
            path = Path(source)
            read = nanogpt.read if path.is_file() else weights.read
            found = read(path, dropout)
        with torch.device("meta"):  # shapes alone: random weights would be drawn in vain
            model = cls(found.config)
        model.load_state_dict(found.state(_shapes(model)), assign=True)
        if found.tied:
            model.tie_head()
        return model.eval()

    def save_pretrained(self, folder: str | Path, *, tokenizer: str | None = None) -> None:
        """Write config.json and model.safetensors as Hugging Face's GPT2LMHeadModel reads them, or
        OpenAIGPTLMHeadModel for norm="post".

        A model that neither class can hold (a window; norm="post" with another MLP than GPT-1's or
        without biases) gets the model_type "gptkernels", which other readers refuse.

        A head that is no longer the embedding is written too, with "tie_word_embeddings": false.

        The name of a `tokenizer` is kept in config.json, where `gptkernels generate` finds it.
        Each file is complete before it gets its name. Raises TypeError for dtypes and ValueError
        for names and shapes that `from_pretrained` would refuse, before anything is written, and
        OSError where the folder cannot be written.
        """
        with torch.device("meta"):
            shapes = _shapes(GPT(self.config))
        weights.write_folder(Path(folder), self.config, self.state_dict(), shapes, tokenizer)

    def set_impl(self, impl: str) -> GPT:
        """Set `.impl` of every layer, and return the model; ValueError for an unknown name."""
        return set_impl(self, impl)

    def set_recompute(self, what: str) -> GPT:
        """Choose what the backward pass computes again instead of keeping it; returns the model.

        "none": nothing.
        "mlp": the MLPs' pre-activations, a third of a block's activations. Costs one more product.
        "block": everything in a block but its input. Costs one more forward pass (Chen et al.,
            "Training Deep Nets with Sublinear Memory Cost", 2016).

        Results stay the same, dropout included. ValueError for any other name.
        """
        check_name("recompute", what, RECOMPUTE)
        self.transformer.recompute_blocks = what == "block"
        for module in self.modules():
            if isinstance(module, MLP):
                module.recompute = what == "mlp"
        return self

    def tie_head(self) -> None:
        """Make lm_head.weight and wte.weight one parameter; assigning to either undoes it."""
        self.lm_head.weight = self.transformer.wte.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to`, `.to_empty` ... call. PyTorch makes two parameters of a tied one where it
        leaves the meta device."""
        # A module that was put in a place may have no weight, or that of one inside it.
        places = self.lm_head, self.transformer.wte
        head, embedding = (module._parameters.get("weight") for module in places)
        super()._apply(fn, recurse)
        if head is not None and head is embedding:
            self.tie_head()
        return self

    def _init_weights(self) -> None:
        # Each block of GPT-2 adds two branches to the stream; the smaller scale keeps the stream's
        # variance from growing with depth. GPT-1's norms do that themselves.
        adds = 2 * self.config.n_layer if self.config.norm == "pre" else 1
        residual_std = _INIT_STD / math.sqrt(adds)
        for name, module in self.transformer.named_modules():  # the head is tied to wte
            if isinstance(module, nn.Linear | nn.Embedding):
                std = residual_std if name.endswith(".c_proj") else _INIT_STD
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def check_tokens(self, tokens: Tensor, start: int = 0) -> None:
        """Raise TypeError or ValueError for tokens that cannot follow `start` others in a text."""
        _check_ids("tokens", tokens)
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(
                f"tokens must have shape (B, T) with T >= 1, got {tuple(tokens.shape)}"
            )
        if start + tokens.shape[1] > self.config.block_size:
            after = f" after {start} in the cache" if start else ""
            raise ValueError(
                f"tokens must fit into block_size={self.config.block_size}, "
                f"got T={tokens.shape[1]}{after}"
            )
        self._check_values("tokens", tokens)

    def _check_cache(self, cache: SlotCache, slot: int | None, tokens: Tensor) -> None:
        # Only on a CPU: on a GPU, reading the lengths would wait for the device.
        start = cache.longest() if slot is None and tokens.device.type == "cpu" else 0
        self.check_tokens(tokens, start)
        rows = cache.slots if slot is None else 1
        if tokens.shape[0] != rows:
            raise ValueError(f"tokens must have a row for each slot, {rows}, got {len(tokens)}")
        if start + tokens.shape[1] > cache.max_tokens:
            raise ValueError(
                f"the cache must hold at most max_tokens={cache.max_tokens} tokens a slot, "
                f"got {tokens.shape[1]} after {start}"
            )

    def _check_targets(self, targets: Tensor, tokens: Tensor) -> None:
        _check_ids("targets", targets)
        if targets.shape != tokens.shape:
            raise ValueError(
                f"targets must have the shape of tokens, {tuple(tokens.shape)}, "
                f"got {tuple(targets.shape)}"
            )
        self._check_values("targets", targets, IGNORED)

    def _check_values(self, name: str, ids: Tensor, ignored: int | None = None) -> None:
        if ids.numel() == 0 or not readable(ids):
            return
        wrong = (ids < 0) | (ids >= self.config.vocab_size)
        if ignored is not None:
            wrong &= ids != ignored
        if wrong.any():
            also = "" if ignored is None else f" or be {ignored}"
            raise ValueError(
                f"{name} must lie in 0...{self.config.vocab_size - 1} (vocab_size - 1){also}, "
                f"got {int(ids[wrong][0])}"
            )


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _check_ids(name: str, ids: Tensor) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(ids).__name__}")
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {dtype_name(ids.dtype)}")
