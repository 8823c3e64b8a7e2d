"""A `BlockStore` in Mooncake Store: a pool of the memory of many hosts."""
