"""What several test modules need: small models, checkpoints, clips, and references in NumPy."""

from support.shape_checker import check as check  # where jaxtyping's pytest option looks for it
