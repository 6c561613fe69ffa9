"""Training recipes of the models that ship with the package; only the command line uses them."""
