"""One model on its texts: decisions, measured points, curves and probes, with results kept on disk.

What needs a model and both texts together belongs here. What is written for the user to take away
belongs to `export`.
"""
