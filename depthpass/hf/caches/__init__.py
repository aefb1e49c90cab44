"""Caches of transformed models, as transformers and its tools see them."""
