"""Tracing, named as in the real package."""
