"""The fine-tuning job: `sft.py` is its table of contents, the folders are what it is made of.

It runs from a clone, with `recipes/` and `ds_configs/`. Imports point downwards: `sft.py`, `assemble`,
`preflight`, `training`, `run`, `model`, `data`, `process`, `config`, and `common` at the bottom.
"""
