"""Batch jobs: a file of requests to a file of results, which a killed job completes later."""
