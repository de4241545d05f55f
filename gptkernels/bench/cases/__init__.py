"""What is timed, one module an op.

Each module offers

    GPU_SHAPES, CPU_SHAPES      of any type, the most telling first
    GPU_DTYPES, CPU_DTYPES
    workloads(shape, dtype, device, quick) -> Iterator[Workload]
"""
