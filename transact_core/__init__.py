"""Width pruning of LLaMA-family models guided by their transitional activations.

Data flows one way, and a module imports only from those before it:

    errors, files      what the rest stands on
    architecture       the numbers that decide a model's size
    models             a source the user names → model, tokenizer, identity
    corpora            text → windows of token ids
    activations        one pass over calibration windows → statistics per layer
    importance         statistics → a score for each head and channel
    plan               scores and two ratios → what each layer keeps
    footprint          architecture → parameters, FLOPs, KV-cache bytes
    surgery            model and plan → a pruned stock LlamaForCausalLM
    recovery           closed-form repair of o_proj and down_proj after the cut
    evaluation         perplexity with its uncertainty
    store              measured tensors on disk, keyed by what determined them
    sweep              ratios → measured points
    export             the output folder and compression.json
    cli                the command line

The method is TransAct: Shen et al., "Pruning Large Language Models to Intra-module Low-rank
Architecture with Transitional Activations", Findings of ACL 2024, arXiv 2407.05690.
"""

__version__ = "0.1.0"
