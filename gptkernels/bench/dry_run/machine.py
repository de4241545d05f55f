"""The GPUs that a dry run can be made for."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Machine:
    """What a dry run has to know of a GPU."""

    name: str
    arch: str
    capability: int
    multiprocessors: int
    shared_bytes: int  # of an SM


MACHINES = {
    machine.arch: machine
    for machine in (
        Machine("A100", "sm80", 80, 108, 164 * 1024),
        Machine("H200", "sm90", 90, 132, 228 * 1024),
    )
}


def machine_here(arch: str | None = None) -> Machine:
    """That of `arch`: this machine's GPU where it is one, else A100 or H200; H200 without either.

    Raises ValueError for another architecture.
    """
    if arch is not None and arch not in MACHINES:
        raise ValueError(f"arch must be {' or '.join(MACHINES)}, got {arch!r}")
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        # Every other GPU runs the kernels for sm80.
        here = "sm90" if (found.major, found.minor) == (9, 0) else "sm80"
        if arch in (None, here):
            known = MACHINES[here]
            return Machine(
                found.name,
                here,
                10 * found.major + found.minor,
                found.multi_processor_count,
                getattr(found, "shared_memory_per_multiprocessor", known.shared_bytes),
            )
    return MACHINES[arch or "sm90"]
