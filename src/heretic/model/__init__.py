"""The language model: loading, residual writers, chat format, forward passes and decoding."""
