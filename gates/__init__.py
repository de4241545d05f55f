"""The gates: they compile every kernel, without a GPU, and compare what it uses with a committed
table.

    python -m gates                         the installed Triton and nvcc, and the builds
    python -m gates --compiler nvcc         nvcc only
    python -m gates --compiler builds       only the builds that Hopper's launchers choose among
    python -m gates --arch 80 90            Triton's kernels for these architectures only
    python -m gates --triton 3.6.0 3.9.0    these versions of Triton, installed under build/
    python -m gates --update                writes what it finds to the tables

Triton kernels are compiled in each configuration that a launcher uses (`shipped()` of the Triton
modules in `gptkernels.ops`), for each architecture that would run it. CUDA C++ kernels are compiled
as they are installed. A gate fails on

- a register spill without a written exemption;
- more shared memory than a thread block may have on that architecture;
- an instruction that the kernel must have and lacks (tensor cores, 16-byte accesses, the tensor
  memory accelerator);
- a note of ptxas that it had to undo setmaxnreg or the overlap of wgmma (C75xx);
- code for an architecture that the source is not meant for;
- a source that takes more than three minutes of one core to compile;
- any number that differs from gates/triton.json or gates/native.json, but for two registers with
  --arch. So a review of a changed kernel shows what the change costs.

The builds come from the emulator's module; they are compared with gates/native.json and with the
shared memory of a thread block. Without nvcc its part is skipped with a message.
"""
