"""The study: its space, its storage, its trials, its front."""
