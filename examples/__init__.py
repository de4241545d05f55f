"""Examples that stand on their own; installed as `gptkernels.examples`."""
