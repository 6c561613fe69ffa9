"""Measures time and memory of each stage, against the limits of the machine and transformers."""
