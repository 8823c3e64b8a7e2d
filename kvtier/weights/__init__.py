"""Which weights an engine has loaded: the files they are in, and a digest of all their bytes."""
