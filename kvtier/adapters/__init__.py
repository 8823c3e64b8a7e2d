"""Engine glue."""
