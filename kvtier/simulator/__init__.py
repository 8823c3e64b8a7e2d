"""Replays traces of requests through kvtier's own manager, policies and tiers, in simulated time and without bytes."""
