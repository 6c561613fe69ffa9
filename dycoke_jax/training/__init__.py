"""Supervised fine-tuning on clips with questions and answers."""
