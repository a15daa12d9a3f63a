"""What CTranslate2 makes of checkpoints.

    python in_ctranslate2.py REQUESTS.json ANSWERS.json

A request has a folder and the tokens of a prompt; the answer holds the log-probabilities of the
next token after each of them, or the error with which the checkpoint is refused.
"""

import json
import sys
import tempfile
from pathlib import Path

import ctranslate2
import numpy as np
import torch


def answer(folder: str, tokens: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as place:
        converted = f"{place}/model"
        ctranslate2.converters.TransformersConverter(folder).convert(converted)
        generator = ctranslate2.Generator(converted, compute_type="float32", intra_threads=1)
        logits = np.array(generator.forward_batch([tokens]))[0]
    return {"log_probabilities": torch.from_numpy(logits).log_softmax(-1).tolist()}


def main() -> None:
    requests = json.loads(Path(sys.argv[1]).read_text())
    answers = {}
    for name, request in requests.items():
        try:
            answers[name] = answer(**request)
        except (ValueError, NotImplementedError, RuntimeError) as error:
            answers[name] = {"error": str(error)}
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
