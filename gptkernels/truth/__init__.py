"""What a correct result is: the fp64 reference, the eager PyTorch baseline, the parity rule that
compares a result with both, and the cases that are compared."""
