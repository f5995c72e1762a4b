"""Private training's arithmetic: sums of clipped per-example gradients, and what makes them a bounded sum."""
