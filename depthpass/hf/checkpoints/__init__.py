"""Folders: saving, loading, what is wrong with one, other projects' checkpoints, stock ones made of programs."""
