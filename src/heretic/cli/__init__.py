"""The command line: commands, options and everything that is printed."""
