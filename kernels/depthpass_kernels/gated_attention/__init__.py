"""Attention to shared keys and to a window of own keys, mixed by a gate: see the `api` module."""
