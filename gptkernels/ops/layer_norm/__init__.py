"""LayerNorm with its residual and dropout, and the linear layer that follows it."""
