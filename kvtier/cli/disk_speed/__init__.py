"""Measures the disk tier's speed beside its device's own; used by the command line and `benchmarks/disk`."""
