"""A linear layer and the cross-entropy of its outputs, whose logits are never whole in memory."""
