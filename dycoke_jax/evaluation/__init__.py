"""Accuracy of a model on the built-in task, with and without compression."""
