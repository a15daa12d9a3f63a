"""What the user takes away: checkpoint folder, `compression.json`, report and model card.

Also how other runtimes read the result. Nothing here decides or measures a cut.
"""
