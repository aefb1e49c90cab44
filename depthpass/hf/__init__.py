"""Hugging Face integration: same-class models, caches, saving and loading."""
