"""Prompt sets: hub, file or bundled."""
