"""The pytest-benchmark suite over gptkernels.bench, and scripts that measure and tune on a GPU."""
