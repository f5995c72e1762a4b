"""Private data generation: images made from what teachers or noisy statistics release, and judges of those images."""
