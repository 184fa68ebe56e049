"""The bundled harmless demo: a small model with a guard against cooking, and the prompt sets to find and remove it."""
