"""The files of a run, its fingerprint and its status."""
