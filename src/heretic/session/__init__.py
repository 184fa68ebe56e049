"""A loaded model made ready for a study."""
