"""A small made-up scene and the command that trains on it: ``gsscale-demo``."""
