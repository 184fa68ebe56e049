"""Scorers: what can be measured of a model, one a file, and their table."""
