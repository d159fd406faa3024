"""LoGra: training data attribution for language models (arXiv 2405.13954).

Nothing is reported to anyone. The Hub's packages read these variables when they are imported, which is after this one.
"""

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # else transformers asks a service to convert .bin weights
