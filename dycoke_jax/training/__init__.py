"""Supervised fine-tuning on clips with questions and answers.

``batches`` packs clips, questions and answers into arrays. ``sources`` (the built-in task) and
``records`` (the user's data) give the batch of each step. ``record_file`` reads the user's records,
with ``json_records`` for their JSON and ``conversations`` for LLaVA's form. ``token_dropping`` says
which visual tokens a step drops, ``loss`` computes the loss and the accuracy of a batch, ``step``
updates the weights once, and ``placement`` says where its arrays lie on a mesh. ``run`` executes a
whole run in a folder, ``scoring`` evaluates on held-out questions, and ``fine_tuning`` combines
them for the command line.
"""
