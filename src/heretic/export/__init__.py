"""Writing the chosen model and proving that it is the one that was measured."""
