"""What a decoded token does in half precision on a CPU: products and attention of a few rows, at the rate of memory."""
