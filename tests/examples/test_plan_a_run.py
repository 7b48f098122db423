"""examples/plan_a_run.py prints plans, and what is wrong with what it was asked."""

import pytest

from examples import plan_a_run as example


def test_it_plans(capsys: pytest.CaptureFixture[str]) -> None:
    example.main(["--model", "llama-8b", "--gpus", "64"])
    out = capsys.readouterr().out
    assert "PREDICTED, not measured: 8.03B parameters on 64 x h100-sxm" in out
    assert "a trillion tokens would take" in out and "torchrun" in out


def test_what_is_wrong_is_one_line() -> None:
    with pytest.raises(SystemExit, match=r"plan_a_run.py: error: model 'llama-9b' is not known"):
        example.main(["--model", "llama-9b"])
