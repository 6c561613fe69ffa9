"""A made-up video question-answering data set whose right answers are known.

A scene (``scenes``) is a description of a clip; it is drawn (``pictures``), written as a video file
(``clip_files``) and asked about (``questions``). ``task`` numbers the clips of its two splits.
"""
