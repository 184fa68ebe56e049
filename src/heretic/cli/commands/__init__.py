"""Commands by subject; importing a module registers its commands."""
