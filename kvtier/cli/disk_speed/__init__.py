"""How fast the disk tier is on a device, beside the device itself: for the command line and `benchmarks/disk`."""
