"""The run directory: where every file of a run lies, and one module a file format."""
