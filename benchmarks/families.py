"""Models of every family, trained for a minute each on the built-in text, cut, and checked.

    python -m benchmarks.families [--families qwen3 gemma3] [--seconds 60] [--output DIR]

No package carries weights of most families that are small enough, so these stand in for real ones:
random models of some 0.8 million parameters whose training has made their channels and heads do
something. Of each the perplexity on text that it was not trained on is printed, dense, with a bare
cut and with a repaired one, and the checks of `tests/models/families/test_honest.py` are made on
the saved checkpoint, as they are on a real one with `TRANSACT_TEST_CHECKPOINT`. The checkpoints are
left in the output folder. The run fails if a check does, or if a repair does not pay.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from tests.conftest import bench_of, make_tokenizer, windows_for
from tests.models.families.made import MEMBERS, make_member
from transact_core.data.corpus import read_corpus
from transact_core.experiments.bench import Bench, Choices, compress
from transact_core.models.load import load_model

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "initializer_range": 0.06,
}
PATTERNS = {
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "gemma3": {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
}
"""What has an entry for each layer."""
WINDOW = 64
"""Tokens of a window in training."""
BATCH = 16
"""Windows of a step."""
HELD_OUT = 30_000
"""Characters at the beginning of the text that are not trained on: what the cuts are calibrated and
measured on."""
MHA_RATIO, MLP_RATIO = 0.25, 0.3


def trained(member: str, seconds: float) -> tuple[PreTrainedModel, int]:
    """A model of that member and the steps of its training.

    `seconds` are the processor's, which a busy machine does not shorten.
    """
    tokenizer = make_tokenizer()
    text = read_corpus("builtin").text[HELD_OUT:]
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    windows = ids[: len(ids) // WINDOW * WINDOW].unflatten(0, (-1, WINDOW))
    model = make_member(member, **SIZES | PATTERNS.get(member, {})).train().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    drawn = torch.Generator().manual_seed(0)
    step, end = 0, time.process_time() + seconds
    while time.process_time() < end:
        batch = windows[torch.randint(len(windows), (BATCH,), generator=drawn)]
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
    return model.eval().requires_grad_(False), step


def perplexities(bench: Bench) -> tuple[float, float, float]:
    """Dense, bare cut, and repaired by least squares."""
    plan = bench.plan(MHA_RATIO, MLP_RATIO, Choices(granularity="kv-groups"))
    cut = [
        compress(bench, plan, recovery)[1].evaluation.perplexity
        for recovery in ("none", "least-squares")
    ]
    return (bench.dense().perplexity, *cut)


def checked(folder: Path) -> bool:
    """Whether the checks of a real checkpoint succeed on this one."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/models/families/test_honest.py"],
        env=os.environ | {"TRANSACT_TEST_CHECKPOINT": str(folder)},
        cwd=root,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stdout[-5000:], file=sys.stderr)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--families", nargs="+", choices=MEMBERS, default=list(MEMBERS), metavar="MEMBER"
    )
    parser.add_argument("--seconds", type=float, default=60, help="of the processor, for training")
    parser.add_argument("--output", type=Path, help="folder of the checkpoints")
    options = parser.parse_args()
    place = options.output or Path(tempfile.mkdtemp(prefix="families-"))
    failed = []
    print("| family | steps | dense | bare cut | least squares | checks |", flush=True)
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for member in options.families:
        folder = place / member.replace(", ", "-")
        model, steps = trained(member, options.seconds)
        tokenizer = make_tokenizer()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        loaded = load_model(str(folder), device="cpu", dtype="float32")
        windows = windows_for(tokenizer, 4096, 2048, WINDOW)
        dense, bare, repaired = perplexities(bench_of(loaded.model, tokenizer, windows))
        right = checked(folder)
        if not right or not dense < repaired < bare:
            failed.append(member)
        figures = f"{dense:.2f} | {bare:.2f} | {repaired:.2f}"
        print(f"| {member} | {steps} | {figures} | {'passed' if right else 'FAILED'} |", flush=True)
    print(f"Checkpoints: {place}")
    if failed:
        sys.exit(f"Not as it should be: {', '.join(failed)}")


if __name__ == "__main__":
    main()
