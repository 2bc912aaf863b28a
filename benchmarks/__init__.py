"""How fast a bundle could be here, how fast it is, and which operators take the time."""
