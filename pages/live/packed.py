"""Bytes as text, in which a component's data hold large tables."""

import base64


def text_of_bytes(content: bytes) -> str:
    """In base64; figures.js reads it."""
    return base64.b64encode(content).decode()
