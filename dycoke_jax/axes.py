"""The axis letters of every shape annotation in this package.

====== ==================================================================================
letter axis
====== ==================================================================================
B      rows of a batch, one request each
F      frames of a clip
C      frames that the vision tower encodes in one call
P      patches of a frame before pooling (729 = 27 x 27)
N      visual tokens of a frame after pooling (196 = 14 x 14, or 169 = 13 x 13)
M      visual tokens of a clip that merging keeps (F * N without merging)
V      visual slots of a prompt: the M tokens and the newline slots among or after them
R      visual slots that an attended working set holds after KV pruning
T      slots of a prompt: prefix, visual, question
S      slots of a key/value cache: the prompt and the generated tokens
W      slots of a working set: the R chosen ones and all that are not visual
G      slots for generated tokens
D      width of a residual stream (vision or language, as the context says)
H      query heads
J      key/value heads (H is a multiple of J)
E      width of a head
L      vocabulary ("lexicon")
====== ==================================================================================

Upper-case letters are axes; ``hw`` are rows and columns of a frame's token grid.
A *slot* is a place in an array; whether it holds a token is said by a ``valid`` mask, and the
rotary position of the token is stored or computed apart from the slot.
"""
