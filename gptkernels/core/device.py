"""The device that the commands, training and the demo run on."""

from __future__ import annotations

import torch


def choose_device(name: str = "auto") -> torch.device:
    """Returns the device called `name`: "cpu", "cuda", "cuda:N", or "auto" for a GPU if there is
    one, else the CPU.

    Raises ValueError for any other name and for a GPU that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device is {name!r}, but this machine has {count} CUDA devices")
    return device
