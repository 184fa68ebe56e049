"""Tests that need a real GPU: python -m pytest -m gpu."""
