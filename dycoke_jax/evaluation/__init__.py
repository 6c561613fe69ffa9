"""Accuracy of a model by kind of question, with and without compression."""
