"""The wire between nodes: channels, frames, schema. Interprets no payload.

Import the modules themselves, as in `from rpc.links import Links`.
"""

__livemigrate__ = True
"""Tells this package from another one of the same name on the path."""
