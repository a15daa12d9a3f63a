"""The main job on the built-in model, checked from outside with nothing but stock transformers."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.builtin

STOCK = """
import json, math, sys
import pydoc_data.topics
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, tokens, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
topics = pydoc_data.topics.topics
text = "\\n\\n".join(topics[name] for name in sorted(topics))
ids = tokenizer(text, return_tensors="pt")["input_ids"][0, :tokens]
total, count = 0.0, 0
with torch.no_grad():
    for start in range(0, tokens - length + 1, length):
        window = ids[None, start : start + length]
        loss = model(window, labels=window).loss
        total, count = total + loss.item() * (length - 1), count + length - 1
prompt = [{"role": "user", "content": "Name a colour."}]
chat = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")
generated = model.generate(**chat, max_new_tokens=8, do_sample=False)
print(json.dumps({"class": type(model).__name__, "perplexity": math.exp(total / count),
                  "new": generated.shape[1] - chat["input_ids"].shape[1],
                  "parameters": sum(weight.numel() for weight in model.parameters())}))
"""


@pytest.fixture
def environment(converted_builtin):
    return os.environ | {"HF_HUB_OFFLINE": "1"}


def test_prune_then_stock_transformers(tmp_path, environment):
    output = tmp_path / "out"
    subprocess.run(
        [
            *(sys.executable, "-m", "transact_core", "prune", "--model", "builtin"),
            *("--mha-ratio", "0.33", "--mlp-ratio", "0.3", "--granularity", "query-heads"),
            *("--calibration-tokens", "1024", "--evaluation-tokens", "512"),
            *("--output", str(output)),
        ],
        check=True,
        env=environment,
        capture_output=True,
    )
    stock = subprocess.run(
        [sys.executable, "-c", STOCK, str(output), "512", "512"],
        check=True,
        env=environment,
        capture_output=True,
        cwd=tmp_path,
    )
    seen = json.loads(stock.stdout.splitlines()[-1])
    report = json.loads((output / "report.json").read_text())
    assert seen["class"] == "LlamaForCausalLM"
    assert seen["perplexity"] == pytest.approx(report["pruned"]["perplexity"], rel=1e-4)
    assert seen["parameters"] == report["pruned"]["parameters"]
    assert 1 <= seen["new"] <= 8
    assert (report["pruned"]["mha_width"], report["pruned"]["mlp_width"]) == (6 * 64, 1075)
    assert report["dense"]["parameters"] == 134_515_008
    assert report["dense"]["perplexity"] < report["pruned"]["perplexity"]
