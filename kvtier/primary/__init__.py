"""The primary tier: host memory, the only one the device reaches."""
