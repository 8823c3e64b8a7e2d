"""The store of tier type `resp`: blocks in Valkey or Redis. redis-py connects and authenticates; kvtier moves the
bytes.
"""
