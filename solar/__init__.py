"""SOLAR 10.7B, from scratch: depth up-scaling of Mistral-7B in plain PyTorch.

The reading order of this repository:

1.  `solar/config.py`      what a model's shape is: the fields of config.json
2.  `kernels/`             what each layer computes: formula first, then the fast forms
3.  `solar/model.py`       one forward pass, in one file
4.  `solar/plan.py`        depth up-scaling as data: which layer of the base stands where
5.  `solar/directory.py`   model directories: names, layouts, checks; `solar/checkpoint.py` makes models of them
6.  `solar/upscale.py`     one streaming copy that carries out a plan
7.  `solar/tokenizer.py`   text to ids and back; prompt templates
8.  `solar/sampling.py`    prefill, decode, choose
9.  `generate.py`          the command that puts them together
10. `train.py`            one loop and a table of stages; before it `solar/losses.py`, `solar/optim.py`, `solar/data.py`
11. `solar/chats.py`      rows of instruction and preference files; then `solar/examples.py`, `solar/packed.py`
12. `solar/reference.py`  what DPO compares with
13. `solar/merge.py`      averages of models
14. `solar/perplexity.py` how well a model predicts a text; `solar/analyze.py`: what its layers do, and the best plan
15. `Makefile`            the recipes: `make align` is the whole paper in miniature
16. `solar/claims.py`     what the papers claim, and `make reproduce`, which measures it; then `solar/trials.py`

Arrows between modules point down only; tests/test_layout.py holds its table of layers against the imports.
"""

import sys


def interruptible() -> None:
    """Let Ctrl-C end in one line before `cli.run` sees to it: while a command's imports run, which take seconds."""

    def show(kind, error, traceback, otherwise=sys.excepthook):
        if not issubclass(kind, KeyboardInterrupt):
            return otherwise(kind, error, traceback)
        print("interrupted", file=sys.stderr)

    sys.excepthook = show


if sys.argv[:1] == ["-m"]:  # `python -m solar.X`, while X is still to be found
    interruptible()
