"""Synthesizers: each makes labelled images from private records within a budget ε. The namespace is the registry."""
