"""Secondary tiers: what a tier decides about its blocks. A store holds the bytes, an executor moves them."""
