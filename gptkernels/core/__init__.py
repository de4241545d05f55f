"""What every op stands on: choice, checks, dropout's masks, the compiled module, Triton."""
