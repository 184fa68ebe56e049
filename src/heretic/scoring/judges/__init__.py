"""Judges, which decide whether an answer is a refusal."""
