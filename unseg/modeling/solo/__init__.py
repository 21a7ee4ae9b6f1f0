"""SOLO: heads, targets and post-processing of mask prediction by locations."""
