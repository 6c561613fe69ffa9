"""The training recipe of the tiny model that ships, from random weights to the checkpoint.

Two pre-training stages come first, because learning from answers alone is slow: in ``alignment``,
visual tokens predict the words for what they depict; in ``probes``, linear probes predict the
contents of the scene from the states of visual tokens. Then the model is fine-tuned on questions in
several stages (``source``), with the probe loss as an auxiliary loss. In the last of them a second
auxiliary loss, ``attention_distillation``, trains the layer whose attention scores the tokens for
KV pruning. ``recipe`` has the settings and runs all stages.
"""
