"""Token files on disk: the cache of tokenised text, their formats and integrity checks."""
