"""Requests, batches of them, and the stream of their answers."""
