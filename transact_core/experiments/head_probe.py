"""What a single attention head does: its attention weights, and the loss without it."""

from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from transact_core.base.errors import Progress, silent
from transact_core.data.corpus import corpus_from_text
from transact_core.data.windows import Windows, tokenise
from transact_core.experiments.bench import Bench
from transact_core.forward.interventions import evaluate_changed
from transact_core.forward.perplexity import Evaluation, paired_difference
from transact_core.forward.stream import Stream, hidden_keys, queries_and_keys


def sample(bench: Bench, text: str, tokens: int) -> Windows:
    """One window of at most this many tokens: of the text, or of the evaluation text where `text`
    is blank.

    Raises:
        TransActError: the text cannot be tokenised for this model.
    """
    if text.strip():
        loaded = bench.loaded
        corpus = corpus_from_text("the sample", text)
        ids = tokenise(corpus, loaded.tokenizer, loaded.architecture.vocab_size)
        return Windows(corpus.source, corpus.sha256, ids[None, :tokens])
    return replace(bench.evaluation, ids=bench.evaluation.ids[:1, :tokens])


@torch.no_grad()
def attention_pattern(
    model: PreTrainedModel, windows: Windows, layer: int, progress: Progress = silent
) -> torch.Tensor:
    """Attention weights of one layer on the first window: the softmax over keys of each query.

    Shape (num_attention_heads, sequence_length, sequence_length), [head, query, key], float32 on
    the CPU. Layers after that one are not run.
    """
    stream = Stream(model, windows)
    for layer_before in range(layer):
        progress("Reading the text", layer_before, layer)
        stream.pass_layer(layer_before)
    with stream.enter(layer) as (decoder, arguments):
        scaling = decoder.self_attn.scaling
        query, key = queries_and_keys(decoder, stream.hidden[:1], arguments)
    query, key = query[0].float(), key[0].float()
    key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
    logits = query @ key.transpose(1, 2) * scaling
    unseen = hidden_keys(arguments, logits.shape[1], logits.device)
    return logits.masked_fill(unseen, -torch.inf).softmax(dim=-1).cpu()


@dataclass(frozen=True)
class WithoutHead:
    """The model's losses with one head's output set to zero."""

    layer: int
    head: int
    evaluation: Evaluation = field(repr=False)
    delta_nll: float
    """Mean per-token difference of NLL from the dense model, in nats."""
    delta_nll_se: float
    """Its standard error, over evaluation windows; NaN with a single one."""


def without_head(bench: Bench, layer: int, head: int, progress: Progress = silent) -> WithoutHead:
    """Measures the model on the evaluation windows with one head's output set to zero.

    Raises:
        TransActError: an activation or the loss is not a number.
    """
    head_dim = bench.loaded.architecture.head_dim
    dense = bench.dense(progress)
    layers = bench.loaded.architecture.num_hidden_layers
    passed = 0

    def zero(transitional: torch.Tensor) -> torch.Tensor:
        changed = transitional.clone()
        changed[..., head * head_dim : (head + 1) * head_dim] = 0
        return changed

    def count() -> None:
        nonlocal passed
        passed += 1
        progress("Measuring without the head", passed, layers)

    progress("Measuring without the head", 0, layers)
    evaluation = evaluate_changed(
        bench.loaded.model, bench.evaluation, {("mha", layer): zero}, count
    )
    return WithoutHead(layer, head, evaluation, *paired_difference(evaluation, dense))
