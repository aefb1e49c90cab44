"""Slot attention: a chunk of queries against a prefix of keys with positions, validity and structure."""
