"""What a run takes of memory and time, planned before anything is loaded."""
