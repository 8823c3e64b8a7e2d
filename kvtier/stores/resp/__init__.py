"""Blocks in Valkey or Redis: redis-py connects, authenticates and knows the cluster; the bytes move here."""
