"""Ahead-of-time Inductor on the CPU: backend.py names it, compile.py shapes code, load.py runs it."""
