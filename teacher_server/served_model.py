"""The files of the served model, against which weights that come later are checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from teacher_server.tensor_files import TensorFiles


@dataclass(frozen=True)
class ServedModel:
    """The model's own files.

    Attributes:
        tied: tensors that the model takes from others, which weights may leave out.
    """

    files: TensorFiles
    tied: frozenset[str]

    @classmethod
    def find(cls, model: str, revision: str | None) -> ServedModel:
        """The safetensors files of a folder, or of a hub name that the engine has downloaded.

        Raises:
            InvalidRequest: it has none.
        """
        from huggingface_hub import snapshot_download
        from transformers import AutoConfig

        folder = Path(model).expanduser()
        if not folder.is_dir():
            patterns = ["*.safetensors", "*.json"]
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns, local_files_only=True))
        config = AutoConfig.from_pretrained(folder).get_text_config()
        tied = frozenset({"lm_head.weight"} if config.tie_word_embeddings else ())
        return cls(TensorFiles.find(folder), tied)
