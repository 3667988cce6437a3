"""Documented import path of the reference; the work is done in `aiether.geometry`."""
