"""How models that ship with the package were made. Nothing else in the package needs these."""
