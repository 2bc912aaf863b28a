"""Torch definitions of the Segment Anything family; this package file and ``catalog`` import without torch."""
