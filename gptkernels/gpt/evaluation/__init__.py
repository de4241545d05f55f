"""Zero-shot, few-shot and perplexity evaluation."""
