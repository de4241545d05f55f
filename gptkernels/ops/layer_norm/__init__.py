"""LayerNorm with residual and dropout, and the linear layer that follows a LayerNorm."""
