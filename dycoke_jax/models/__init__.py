"""The networks in Flax NNX: no compression, no files, no devices."""
