"""Traces of single answers: which visual tokens were kept and attended to, also as pictures."""
