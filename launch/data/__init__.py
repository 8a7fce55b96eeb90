"""Data for supervised fine-tuning: read, recognise, encode, mask; every dropped row accounted for."""
