"""Plan the memory and placement of a run before anything is loaded."""
