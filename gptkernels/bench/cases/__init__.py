"""What is timed, one module an op."""
