"""Latency, accuracy and the floor: what a report is made of."""
