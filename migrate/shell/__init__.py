"""I/O: performs what the core asks for and turns the results into events."""
