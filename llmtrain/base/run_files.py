"""Names of the files in a run directory and in a checkpoint: the only place that spells them."""

CONFIG = "config.yaml"  # of a run, and of each checkpoint
ENVIRONMENT = "environment.json"
OVERRIDES = "overrides.json"  # of a sweep's job: its overrides
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
SUMMARY = "summary.json"
LOG = "train.log"
LOSS_PLOT = "loss.png"
LOCK = ".lock"
PROFILE = "profile"  # folder
CHECKPOINTS = "checkpoints"  # folder
TENSORBOARD = "tensorboard"  # folder
TOKENIZER = "tokenizer"  # folder: a copy of the files that the tokenizer is made of

# of a checkpoint
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
INDEX = "index.json"  # where several ranks hold the tensors: their boxes and files
STATE = "state.json"
MANIFEST = "manifest.json"
