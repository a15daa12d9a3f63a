"""From a source the user names to a model in memory, its numbers and its identity.

Reading and checking checkpoint folders and GGUF files, the architecture's sizes, devices and memory
estimates belong here. What runs the model (`forward`) or changes it (`pruning`) does not.
"""
