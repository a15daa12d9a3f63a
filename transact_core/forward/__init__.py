"""Windows through the layers of a model, and what is observed on the way.

Activation statistics, the residual stream layer by layer, perplexity, generation and latency belong
here. Models are only read; scoring units belongs to `importance`.
"""
