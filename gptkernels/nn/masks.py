"""The masks of PyTorch's transformer layers, as this package's attention takes them."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_masks(
    mask: Tensor | None,
    padding: Tensor | None,
    shape: torch.Size,
    dtype: torch.dtype,
    keys: int,
    names: tuple[str, str],
) -> Tensor | None:
    """Both masks as one that `gptkernels.attention` takes for q of this shape, (B, T, nhead, D),
    and so many keys: it broadcasts to (B, nhead, T, keys).

    mask: (T, keys) or (B * nhead, T, keys); padding: (B, keys), or (keys,) for one text. A boolean
    one is True where a key must not be seen, a floating one is added to the scores. Raises
    TypeError and ValueError for others, under these names.
    """
    B, T, nhead, _ = shape
    mask_name, padding_name = names
    for name, tensor in zip(names, (mask, padding), strict=True):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if mask is not None:
        given = tuple(mask.shape)
        if given not in ((T, keys), (B * nhead, T, keys)):
            raise ValueError(
                f"{mask_name} must have shape {(T, keys)} or {(B * nhead, T, keys)}, got {given}"
            )
        mask = _attention_mask(mask_name, mask, dtype)
        mask = mask.view(B, nhead, T, keys) if mask.dim() == 3 else mask
    if padding is not None:
        given = tuple(padding.shape)
        if given != (B, keys) and not (B == 1 and given == (keys,)):
            raise ValueError(f"{padding_name} must have shape {(B, keys)}, got {given}")
        padding = _attention_mask(padding_name, padding, dtype).view(B, 1, 1, keys)
    if mask is None or padding is None:
        return padding if mask is None else mask
    if mask.dtype == padding.dtype == torch.bool:
        return mask & padding
    return _additive(mask, dtype) + _additive(padding, dtype)


def _attention_mask(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`mask` as `gptkernels.attention` takes it: True where a key is seen, or added to scores."""
    if mask.dtype == torch.bool:
        return ~mask
    if not mask.is_floating_point():
        raise TypeError(f"{name} must be boolean or floating, got {mask.dtype}")
    return mask.to(dtype)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, -torch.inf)
