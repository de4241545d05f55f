"""The gates: every kernel compiled with no GPU, and held to a committed table.

    python -m gates                         the installed Triton and nvcc, against their tables
    python -m gates --compiler nvcc         one of them
    python -m gates --compiler builds   what the launchers of Hopper's kernels choose among
    python -m gates --arch 80 90            Triton's kernels for these architectures alone
    python -m gates --triton 3.6.0 3.9.0    those versions, installed aside under build/
    python -m gates --update                rewrite these compilers' part of the tables

Triton kernels are compiled in each configuration that a launcher ships (`shipped()` of each of
`gptkernels.ops`), for each architecture that would run it; CUDA C++ kernels as they are installed.
A gate fails on a register spill that no written exemption allows, on more shared memory than a
thread block may have there, on instructions that a kernel of its name must have and has not (tensor
cores, 16-byte accesses, the tensor memory accelerator), on what ptxas says it had to undo
(setmaxnreg, overlapping wgmma: notes C75xx), on code for another architecture than a source is for,
on a source that takes more than three minutes of one core, and on any number that differs from
gates/triton.json or gates/native.json: what a change of a kernel costs shows where the change is
reviewed. Builds are asked for from the module that is built for this CPU, and held to gates/
native.json and to the shared memory of a thread block. Without nvcc its part is skipped, and says
so.
"""
