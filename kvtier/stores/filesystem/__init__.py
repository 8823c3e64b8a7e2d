"""One file a block, on a filesystem that any number of hosts share."""
