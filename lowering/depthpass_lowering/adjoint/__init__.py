"""The backward pass of a chunk's graph as a graph of its own, derived by rules instead of recorded by autograd."""
