"""Names of what a run directory holds. Users and later starts of the same run look for files by these names."""

from pathlib import Path

RUNS = Path("runs")  # where run directories are numbered when none is named

LOCK = ".lock"
RECIPE = "recipe.yaml"
STARTED = "started.txt"
DEEPSPEED = "deepspeed.json"
METRICS = "metrics.jsonl"
DROPPED = "dropped.txt"
SAMPLES = "samples.jsonl"
ABOUT = "about.json"
REPORT = "report.html"
SMOOTHING_PRIOR = "smoothing_prior.safetensors"  # of a run, and of a model that it exports
PREVIEW = "preview"  # in RUNS, where a preview is written if no directory is named
PREVIEW_HTML = "preview.html"
PREVIEW_JSONL = "preview.jsonl"
TENSORBOARD = "runs"
TRACEBACK = "traceback-{rank}.txt"
TRACEBACKS = TRACEBACK.format(rank="*")

EVALUATION_FOLDER = "evaluation"  # in MODEL
EVALUATION = "evaluation.json"

CHECKPOINT = "checkpoint-{step}"
MODEL = "model"
MODEL_CARD = "README.md"  # in MODEL
WEIGHTS = "*.safetensors"

PARTIAL = ".partial"  # suffix of what is being written; it is renamed once it is whole
CHECKPOINT_PARTIAL = f"checkpoint{PARTIAL}"
UNIVERSAL_PARTIAL = f"checkpoint.universal{PARTIAL}"
MODEL_PARTIAL = f"{MODEL}{PARTIAL}"
DAMAGED = "damaged-"  # prefix of a checkpoint that is not whole; it is kept for the user
REMOVED = "removed-"  # prefix of a checkpoint that is being deleted
