"""Language models and tokenizers from folders, for the command line; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from depthpass.errors import InputError


def load_language_model(folder: str) -> Any:
    """A stock or transformed causal language model that ``save_pretrained`` wrote, in evaluation mode.

    Raises:
        InputError: there is no such folder, or no causal language model in it.
    """
    from transformers import AutoModelForCausalLM

    if not (Path(folder) / "config.json").is_file():
        raise InputError(f"expected a folder with a model that save_pretrained wrote, got {folder!r}, which has no config.json.")
    try:
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder!r}: no causal language model can be loaded from it: {error}") from error


def load_tokenizer(folder: str) -> Any:
    """The tokenizer in a folder.

    Raises:
        InputError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder!r}: samples are text, but no tokenizer can be loaded from the folder ({error}). Save one "
                         "there, or give token ids.") from error
