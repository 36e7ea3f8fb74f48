"""Memories that last: a text is read once, kept on disk, and asked at any time, from any server."""
