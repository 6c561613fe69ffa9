"""Array operations that the models share."""
