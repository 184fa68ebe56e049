"""The run and the actions on its results."""
