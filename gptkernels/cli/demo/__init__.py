"""The demo: train, sample, check, time, report."""
