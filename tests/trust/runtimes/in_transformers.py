"""What stock transformers, of whatever version is installed, makes of checkpoints.

It imports nothing of this repository, so that it runs with a transformers that the app cannot use.
A request has a folder and texts; the answer to each holds the class of the model, and for each text
its token ids and the log-probabilities of the next token after each of them, or the error.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def answer(folder: str, texts: list[str]) -> dict:
    """What is in the folder, asked for the next tokens of the texts, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [tokenizer(text)["input_ids"] for text in texts]
    with torch.inference_mode():
        logits = [model(torch.tensor([each])).logits[0].log_softmax(-1) for each in ids]
    return {
        "class": type(model).__name__,
        "ids": ids,
        "log_probabilities": [each.tolist() for each in logits],
    }


if __name__ == "__main__":
    # Not found where a test imports `answer`.
    from answering import run

    torch.set_num_threads(1)
    run(answer)
