"""The gates: every Triton kernel compiled with no GPU, and held to a committed table.

    python -m gates                         the installed Triton against gates/triton.json
    python -m gates --triton 3.6.0 3.9.0    those versions, installed aside under build/
    python -m gates --update                rewrite this Triton's part of the table

Each configuration that a launcher ships (`shipped()` of each of `gptkernels.triton_kernels`) is
compiled for each architecture that would run it. A gate fails on a register spill that no written
exemption allows, on more shared memory than a thread block may have there, and on any number that
differs from the table: what a change of a kernel costs shows where the change is reviewed.
"""
