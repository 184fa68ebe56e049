"""The ablation: directions, strength kernels, operators, and two ways to apply them."""
