"""What the pages have in common."""

# Every session imports in a thread of its own, and the lazy imports of transformers fail now and
# then when two threads meet in them. A package's own import lock makes the second one wait.
from transformers import LlamaForCausalLM  # noqa: F401
