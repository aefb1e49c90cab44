"""Lowering: runs depth programs on captured models."""
