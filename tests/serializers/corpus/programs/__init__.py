"""The cases, by subject; see `tests.serializers.corpus`."""
