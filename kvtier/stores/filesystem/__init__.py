"""One file per block, on a filesystem that any number of hosts share."""
