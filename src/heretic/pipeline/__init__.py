"""The main job and what is done with its results."""
