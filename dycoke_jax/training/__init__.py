"""Supervised fine-tuning on clips with questions and answers.

``records`` and ``sources`` give the batches of every step (``batches``), ``loss`` scores the
answers, ``step`` changes the weights once, ``run`` does so for a whole run in a folder, and
``fine_tuning`` puts it together for the command line.
"""
