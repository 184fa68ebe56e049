"""What the computer has: locks, GPUs, memory, and whether a run can succeed on it."""
