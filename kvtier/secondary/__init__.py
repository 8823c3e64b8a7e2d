"""Secondary tiers: any store made a tier, its bytes moved by a process of its own."""
