"""The recipe of the tiny model that ships, from random weights to the checkpoint.

Two pre-training stages teach what answers alone would teach slowly: ``alignment`` (visual tokens
predict the words for what they show) and ``probes`` (linear probes read from the states of visual
tokens what the scene holds). Then the model is fine-tuned on questions, stage after stage
(``source``); the probe loss goes on as an auxiliary loss, and in the last stage
``attention_distillation`` makes the layer that chooses for KV pruning attend to what later layers
read. ``recipe`` has the settings and runs all of it.
"""
