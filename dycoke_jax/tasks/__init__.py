"""The built-in task: made-up clips, with questions whose right answers are known.

``scenes`` draws random descriptions of clips. From a description, ``pictures`` paints the frames
and ``questions`` makes questions and answers. ``task`` numbers the clips of the training and the
test split, and ``clip_files`` encodes frames as a video file.
"""
