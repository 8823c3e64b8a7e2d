"""Identifies the weights that an engine has loaded: finds their files, and hashes all of their bytes."""
