"""Attention: of a batch (`dense`), of packed sequences (`varlen`), and of new tokens to a cache
(`decode`)."""
