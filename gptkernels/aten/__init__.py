"""impl="torch": PyTorch's own fused ops where their options allow, the formula where not.

One module per op. Each function has the name and signature of its twin in `triton_kernels`; they
run under no_grad, inside the registered ops.
"""
