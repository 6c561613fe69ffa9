"""Array operations that the models share: attention, rotary embedding, pooling."""
