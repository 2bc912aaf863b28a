"""How the built-in model is trained, measured and distilled; see README.md in this folder."""
