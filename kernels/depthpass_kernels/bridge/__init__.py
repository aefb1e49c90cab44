"""The bridge: a delayed low-rank stream added to the hidden stream, fused with the norm that follows."""
