"""Visits: one block over some tokens against its slots, and which tokens."""
