"""LoGra: training data attribution for language models (arXiv 2405.13954).

The package sends no usage data. It sets these variables here because the Hub's packages read them at import.
"""

import os
import tempfile

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # the scripts have bars of their own
os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # and print each error once
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # else transformers asks a service to convert .bin weights

try:
    tempfile.gettempdir()
except FileNotFoundError as error:  # torch needs one at import
    reason = f"expected a folder for temporary files that can be written, got none ({error.strerror})"
    raise SystemExit(f"{reason}; set TMPDIR to one") from None
