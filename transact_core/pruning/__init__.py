"""From scores to a plan, and from the plan to a smaller, repaired model.

The plan is the one description of a cut; surgery carries it out and recovery repairs it. What a cut
would cost before it is made belongs to `planning`.
"""
