"""The language model: loading, its writers, its chat format, what it thinks and what it says."""
