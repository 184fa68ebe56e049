"""Screen output of the commands."""
