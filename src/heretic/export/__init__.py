"""Write the selected model and verify that it is the one that was measured."""
