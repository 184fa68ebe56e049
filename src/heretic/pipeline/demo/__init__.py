"""Harmless bundled demo: a small model that refuses to talk about cooking, and prompt sets to ablate that refusal."""
