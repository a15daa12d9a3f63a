"""Width pruning of LLaMA-family models guided by their transitional activations.

Data flows one way, and a module imports only from those before it:

    errors, files      what the rest stands on
    memory             large blocks go back to the system when they are freed
    architecture       the numbers that decide a model's size
    devices            where and in which dtype a model computes, and whether it fits there
    folders            a checkpoint folder, looked through and loaded
    ggufs              a GGUF file, looked through and converted to a folder
    models             a source the user names → model, tokenizer, identity
    corpora            text → windows of token ids
    activations        one pass over calibration windows → statistics per layer
    streams            the residual stream of all windows, run layer by layer
    ridge              least squares for a repair, judged on folds of the windows
    elimination        which channels least squares can do without
    saliences          weight · gradient
    importance         evidence → a score for each head and channel
    rotary             rotary pairs: their effect on attention, slots of narrower heads
    plan               scores and two ratios → what each layer keeps
    footprint          architecture → parameters, FLOPs, KV-cache bytes
    preview            what every position of the sliders leaves, as tables to draw from
    surgery            model and plan → a pruned stock LlamaForCausalLM
    narrowing          queries, keys and values of narrower heads, fitted
    recovery           closed-form repair after the cut
    damage             what each layer would lose at every width
    evaluation         perplexity with its uncertainty
    interventions      the loss when activations are changed on the way
    generation         a prompt → tokens one by one, and how long each took
    latency            how long prefill and decode take, two models in turns
    store              measured tensors on disk, keyed by what determined them
    bench              one model on one pair of texts: plan, cut, repair, measure
    premise            which activations may be disturbed
    heads              where a head looks, and the loss without it
    redundancy         what of the waists a plan keeps, and the damage it does
    prediction         damage and measured points → perplexity everywhere, with an interval
    targets            the position that meets a target
    decide             which granularity; cuts in several steps, or module by module
    results            measured points on disk, so that nothing is measured twice
    sweep              ratios → measured points
    frontier           measured points → those that no other beats
    runtimes           which runtimes beside transformers read a cut right
    checkpoint         weights written tensor by tensor
    export             the output folder and compression.json
    cli                the command line

The method is TransAct: Shen et al., "Pruning Large Language Models to Intra-module Low-rank
Architecture with Transitional Activations", Findings of ACL 2024, arXiv 2407.05690.
"""

__version__ = "0.4.0"
