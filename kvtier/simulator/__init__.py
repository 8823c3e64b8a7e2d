"""Replays traces of requests through kvtier's manager, policies and tiers, in simulated time and without bytes."""
