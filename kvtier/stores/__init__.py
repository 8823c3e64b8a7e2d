"""Stores: blocking bytes, each in one I/O process."""
