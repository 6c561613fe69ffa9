"""A made-up video question-answering task, and accuracy on it with and without compression."""
