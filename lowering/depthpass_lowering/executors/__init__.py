"""Executors: how the regions of a lowered program are run, level by level."""
