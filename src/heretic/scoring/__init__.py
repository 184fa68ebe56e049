"""What a trial is worth: one scorer a file."""
