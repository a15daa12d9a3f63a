"""From a cut to a trained cut: distillation from the dense model, with an optimiser.

What repairs in closed form is in `pruning`; which text is trained on is decided in `data`. Nothing
here writes an output folder.
"""
