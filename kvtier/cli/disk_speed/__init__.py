"""How fast the disk tier is on a device, beside the device itself: for `benchmarks/disk.py` and the command line."""
