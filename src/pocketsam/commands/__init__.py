"""The commands, one module a subject; ``cli.py`` registers them. Heavy imports stay inside the handlers."""
