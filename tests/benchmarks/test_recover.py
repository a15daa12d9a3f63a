"""The table of benchmarks.recover."""

import math

from benchmarks.recover import VARIANTS, main, markdown
from transact_core.export.compression import Evaluated, Training, Watched


def look(step: int, kl: float, nll: float) -> Evaluated:
    return Evaluated(step=step, texts={"a/text.txt": Watched(kl=kl, nll=nll)})


def test_a_row_for_each_look_with_what_is_back():
    training = Training.model_construct(
        windows_per_step=4,
        sequence_length=512,
        dense_nll={"a/text.txt": 3.0},
        evaluated=(look(0, 0.5, 3.4), look(8, 0.3, 3.1)),
        seconds=60.0,
    )
    first, second = markdown({"full, kl": training}).splitlines()[2:]
    assert first == f"| full, kl | 0 | text.txt | 0.5000 | {math.exp(0.4):.3f} | 0.0% | 60 |"
    assert second == f"| full, kl | 16,384 | text.txt | 0.3000 | {math.exp(0.1):.3f} | 75.0% | 60 |"


def test_a_way_that_does_not_exist_is_refused_in_one_sentence(tmp_path, capsys):
    assert main(["--model", "cut", "--folder", str(tmp_path), "--variants", "by magic"]) == 2
    assert f"is none of {'; '.join(VARIANTS)}" in capsys.readouterr().err
