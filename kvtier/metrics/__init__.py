"""Metrics: the table of them, their values, and what prometheus-client reads."""

from __future__ import annotations

from kvtier.metrics.prometheus import collector
from kvtier.metrics.rows import GROUPS, METRICS, OFF_REASONS, PRIMARY, Kind, Label, Metric, Source

__all__ = ["collector", "GROUPS", "METRICS", "OFF_REASONS", "PRIMARY", "Kind", "Label", "Metric", "Source"]
