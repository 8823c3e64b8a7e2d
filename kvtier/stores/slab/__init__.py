"""The slab: a fixed-slot store on a local disk."""
