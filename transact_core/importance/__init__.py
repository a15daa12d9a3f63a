"""From evidence about the units of a model to a score for each head and each channel.

Each importance is one function registered in `scores`; the measurements that they share stand in
modules of their own. Which units are then removed is decided in `pruning`.
"""
