"""The computer: GPUs, memory, locks, threads."""
