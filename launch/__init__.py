"""The fine-tuning job: `sft.py` is its table of contents, the folders are what it is made of.

It runs from a clone, with `recipes/` and `ds_configs/`. Imports point downwards: `common`, then `config`, `data`,
`model`, `process`, `run`, `training`, `preflight`, and `sft.py` at the top.
"""
