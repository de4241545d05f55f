"""What `gptkernels.accelerate` does to a model of somebody else. Each kind of module that it swaps
has a file."""
