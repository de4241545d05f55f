"""Text from a GPT: a cache in slots, an engine, sampling."""
