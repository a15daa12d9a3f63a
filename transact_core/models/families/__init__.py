"""Model families: what the engine has to know of each, one module a family.

A family is data (`description.Family`), and imports neither torch nor transformers. The engine asks
the description and never tests a model's name; a further family of the known shape is a module here
and a line in `table`.
"""
