"""The edit itself: directions, kernels, operators, and the two ways to apply them."""
