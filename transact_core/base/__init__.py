"""What the rest stands on: errors, files, memory, the disk cache and shared linear algebra.

Nothing here knows of models, texts or pruning. A helper that names a layer, a head or a token does
not belong here.
"""
