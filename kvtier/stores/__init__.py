"""Stores: blocking backends of bytes. Each store runs in its tier's I/O process."""
