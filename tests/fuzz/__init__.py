"""Fuzzing of every reader: see readers.py for what is read, run.py for the long run."""
