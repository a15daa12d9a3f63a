"""What a cut would cost, worked out before it is made.

Exact sizes at every slider position, the error of each layer at every width, the law that predicts
the loss from it, targets and frontiers. Nothing here measures a pruned model; `experiments` does.
"""
