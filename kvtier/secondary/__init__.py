"""Secondary tiers: any store made a tier, its bytes moved by an executor."""
