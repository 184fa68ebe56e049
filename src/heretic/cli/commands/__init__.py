"""The commands, by subject; importing a module here adds its commands to the application."""
