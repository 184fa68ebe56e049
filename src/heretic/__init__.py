"""Directional ablation of open-weight language models, driven by one TOML file."""

__version__ = "0.1.0"
