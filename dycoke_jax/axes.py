"""The axis letters of every shape annotation in this package, and the words for slots and tokens.

====== ==================================================================================
letter axis
====== ==================================================================================
B      rows of a batch, one request each
F      frames of a clip
C      frames that the vision tower encodes in one call
P      patches of a frame before pooling (729 = 27 x 27)
N      visual tokens of a frame after pooling (196 = 14 x 14, or 169 = 13 x 13)
M      visual tokens of a clip that enter the language model (F * N without compression)
T      slots of a sequence: of a prompt, or of a prompt with what follows it in training
S      slots of a key/value cache: the prompt and the generated tokens
Q      queries of attention: a block of them, or the slots of questions and answers in training
D      width of a residual stream (vision or language, as the context says)
H      query heads
K      key/value heads (H is a multiple of K)
G      query heads of a key/value head (G = H / K)
E      width of a head
V      vocabulary
====== ==================================================================================

Upper-case letters are axes. Other axes are words in lower case, which say what they count:
``visual`` (the visual slots of a prompt: the M tokens and the newline slots among or after them),
``chosen``, ``working``, ``generated``, ``prefix``, ``question``, ``height``, ``width`` and so on.

A *slot* is a place in an array. The rotary position of a token is stored or computed apart from its
slot. Words with one meaning each:

========== ==============================================================================
kept       visual tokens that compression lets into the language model
chosen     visual slots that KV pruning selected for the layers that it prunes
attended   visual tokens that those layers attend to in a decode step, as counted
valid      slots that hold a token; the others are empty
visible    slots that a query may attend to: valid ones that nothing hides
========== ==============================================================================
"""
