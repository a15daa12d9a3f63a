"""From a text source the user names to windows of token ids.

Every kind of `SOURCE` is parsed here, and calibration and evaluation windows are kept apart. What
is computed on the windows belongs to `forward` and later rooms.
"""
