"""Studies in a database, shared by several workers."""
