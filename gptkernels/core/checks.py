"""Argument checks that the ops share. Each failure is one sentence that names the argument, what
was wanted and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels.core.transforms import batched

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMBER = (int, float, torch.SymInt, torch.SymFloat)


def check_is_tensor(name: str, value: Tensor) -> None:
    """Checks that `value` is a tensor. Raises TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_tensor(name: str, tensor: Tensor) -> None:
    """Checks that `tensor` is a tensor with a dtype that the kernels support. Raises TypeError."""
    check_is_tensor(name, tensor)
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16 or float16, got {dtype_name(tensor.dtype)}"
        )


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], why: str) -> None:
    """Checks that `tensor` is one and has exactly `shape`; `why` tells the user where that shape
    comes from. Raises TypeError, ValueError."""
    check_is_tensor(name, tensor)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name} must have shape {tuple(shape)} ({why}), got {tuple(tensor.shape)}"
        )


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Checks that both tensors are on one device. Raises ValueError."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}"
        )


def check_same_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Checks that both tensors have one dtype. Raises TypeError."""
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other_name}, {dtype_name(other.dtype)}, "
            f"got {dtype_name(tensor.dtype)}"
        )


def check_unit_last_stride(name: str, tensor: Tensor) -> None:
    """Checks that the last stride is 1, which vector loads require. Raises ValueError. Inside vmap
    the rules of the ops (`core.vmap`) see to it."""
    if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1 and not batched(tensor):
        raise ValueError(
            f"{name} must have a unit stride in its last dimension, "
            f"got strides {tuple(tensor.stride())}; call .contiguous() on it"
        )


def check_integer(name: str, value: int) -> None:
    """Checks that `value` is an int and not a bool. Raises TypeError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")


def check_seed(name: str, value: int) -> None:
    """Checks that `value` is a seed, an int that PyTorch's generators take. Raises TypeError,
    ValueError."""
    check_integer(name, value)
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{name} must lie in -2**63...2**64 - 1 or be None, got {value}")


def check_flag(name: str, value: bool) -> None:
    """Checks that `value` is True or False. Raises TypeError."""
    if not isinstance(value, bool | torch.SymBool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def check_number(name: str, value: float) -> None:
    """Checks that `value` is an int or a float and not a bool. Raises TypeError."""
    if not isinstance(value, NUMBER) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """Checks that `value` is a number above 0. Raises TypeError, ValueError."""
    check_number(name, value)
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def check_probability(name: str, value: float) -> None:
    """Checks that `value` is a probability in [0, 1]. Raises TypeError, ValueError."""
    check_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")


def dtype_name(dtype: torch.dtype) -> str:
    """Returns a dtype's name without its module: 'bfloat16' for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def check_count(name: str, value: int) -> int:
    """Checks that `value` is an integer of at least 1, and returns it. Raises TypeError,
    ValueError."""
    check_integer(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
