"""What is timed, one module an op, and modules for whole models.

Each module offers

    shapes(device_type, level) -> Sequence[Shape]       the most telling first; level is "quick",
                                                        "default" or "full"; str(shape) names it
    dtypes(device_type, level) -> Sequence[torch.dtype]
    cases(shape, dtype, device, impls) -> Iterator[Case]
"""
