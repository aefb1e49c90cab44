"""Products with parameters: packed weights, weight gradients that leave the loop, compiled segments."""
