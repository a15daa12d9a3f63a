"""What CTranslate2 makes of checkpoints.

A request has a folder and the tokens of a prompt; the answer holds the log-probabilities of the
next token after each of them, or the error with which the checkpoint is refused.
"""

import tempfile

import ctranslate2
import numpy as np
import torch
from answering import run


def answer(folder: str, tokens: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as place:
        converted = f"{place}/model"
        ctranslate2.converters.TransformersConverter(folder).convert(converted)
        generator = ctranslate2.Generator(converted, compute_type="float32", intra_threads=1)
        logits = np.array(generator.forward_batch([tokens]))[0]
    return {"log_probabilities": torch.from_numpy(logits).log_softmax(-1).tolist()}


if __name__ == "__main__":
    run(answer, (ValueError, NotImplementedError, RuntimeError))
