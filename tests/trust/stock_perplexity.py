"""Run by whichever transformers is installed: what it makes of checkpoint folders, as JSON.

    python stock_perplexity.py FOLDER...

For each folder: the version, the token ids of the words below, their text again, the perplexity of
the ids in float32, and the tokens that the tokenizer marks as special. Imports nothing of the
project, so that it also runs where only an older transformers is.
"""

import json
import math
import sys
from pathlib import Path

import torch
import transformers

WORDS = """An assignment statement evaluates the expression list (remember that this can be a single
expression or a comma-separated list, the latter yielding a tuple) and assigns 1, 22, 333 or 4444
objects to each of the target lists, from left to right. Größe, 東京 and naïve\tcafé  cost 12.50 €."""


def read(folder: str) -> dict:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = model.float().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(WORDS, return_tensors="pt")
    with torch.inference_mode():
        loss = model(**inputs, labels=inputs["input_ids"]).loss.item()
    ids = inputs["input_ids"][0].tolist()
    return {
        "class": type(model).__name__,
        "ids": ids,
        "text": tokenizer.decode(ids),
        "perplexity": math.exp(loss),
        "special": sorted(tokenizer.all_special_tokens),
        "padding_side": tokenizer.padding_side,
        "chat": bool(tokenizer.chat_template),
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
    }


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    found = {Path(folder).name: read(folder) for folder in sys.argv[1:]}
    print(json.dumps({"transformers": transformers.__version__, "folders": found}))
