"""What `teacher-server serve` is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from protos.wire import MAX_MESSAGE_BYTES


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of one server process.

    Attributes:
        model: A model folder or hub name.
        name: The name that requests may ask for.
        revision: The hub revision; the default branch when absent.
        engine: vllm, or transformers: the slow reference that runs anywhere.
        openai: Whether stock OpenAI clients are answered too: /v1/models, /v1/completions, /v1/chat/completions (vllm).
        host: The address to listen on; 0.0.0.0 is every interface.
        http_port: The HTTP port; 0 picks a free one.
        grpc_port: The gRPC port; 0 picks a free one.
        dtype: Of weights and activations; auto is the model's own. Log-probs are computed in float32 always.
        max_model_len: Tokens of prompt, privileged information and completion together; the model's own when absent.
        max_top_k: The largest K; the engine's own limit when absent.
        max_items: Items of one request.
        max_tokens_in_flight: Tokens in the engine at a time; the rest waits.
        max_queued_tokens: Tokens that may wait; of one client no more than is free, so half of it when alone. A request
            beyond is refused as Overloaded.
        teacher: LoRA adapters of the model to serve as further teachers, as NAME=FOLDER; may be repeated.
        max_adapters: LoRA adapters at a time; as many as `teacher` names when absent.
        max_lora_rank: The largest rank of an adapter.
        weights_root: The folder below which clients may name weights by path; no paths are taken when absent.
        weights_transfer: Lets holders of an admin token have new weights broadcast from their process straight to the
            engine's workers, over gloo, or over nccl from GPU to GPU (vllm). The workers connect to the address that
            the token's holder names, and what comes from there is neither encrypted nor authenticated.
        tensor_parallel_size: GPUs that share the model (vllm).
        kv_cache_gib: Memory for the KV cache in GiB (vllm); what is free on the GPU when absent.
        threads: CPU threads of the engine; the libraries' own choice when absent.
        max_message_mib: MiB of one request.
        tokens: A TOML file of bearer tokens (see teacher_server.tokens); the environment variable TEACHER_TOKENS may
            hold its text instead. Without tokens, score and generate are open to all and admin is off.
        tls_cert: The certificate chain for both listeners, PEM; plaintext when absent.
        tls_key: Its key, PEM.
        tls_client_ca: The authority that clients' certificates must come from (mTLS), PEM.
        drain_timeout_s: Seconds that work in flight may take after SIGTERM.
        otel_endpoint: The base URL of an OpenTelemetry collector that takes OTLP over HTTP, as in
            http://localhost:4318; without it and without OTEL_EXPORTER_OTLP_ENDPOINT no spans are made.
        ready_file: A file to write {http_url, grpc_url, pid} to as JSON once the server is ready.
    """

    model: str
    name: str = "base"
    revision: str | None = None
    engine: Literal["vllm", "transformers"] = "vllm"
    openai: bool = True
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    dtype: str = "auto"
    max_model_len: int | None = None
    max_top_k: int | None = None
    max_items: int = 1024
    max_tokens_in_flight: int = 2**18
    max_queued_tokens: int = 2**23
    max_message_mib: int = MAX_MESSAGE_BYTES // 2**20
    tokens: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    teacher: tuple[str, ...] = ()
    max_adapters: int | None = None
    max_lora_rank: int = 64
    weights_root: Path | None = None
    weights_transfer: Literal["gloo", "nccl"] | None = None
    tensor_parallel_size: int = 1
    kv_cache_gib: float | None = None
    threads: int | None = None
    drain_timeout_s: float = 30.0
    otel_endpoint: str | None = None
    ready_file: Path | None = None

    def __post_init__(self) -> None:
        for name, least, most in (
            ("http_port", 0, 2**16 - 1),
            ("grpc_port", 0, 2**16 - 1),
            ("max_message_mib", 1, MAX_MESSAGE_BYTES // 2**20),
        ):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from {least} to {most}")
        lowest = {"max_model_len": 2, "max_top_k": 0, "max_items": 1, "max_tokens_in_flight": 1, "max_queued_tokens": 1}
        lowest |= {"max_lora_rank": 1, "max_adapters": len(self.teacher)}
        for name, least in (lowest | {"tensor_parallel_size": 1, "threads": 1, "drain_timeout_s": 0}).items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if self.kv_cache_gib is not None and self.kv_cache_gib <= 0:
            raise ValueError(f"kv_cache_gib is {self.kv_cache_gib}; it must be above 0")
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("tls_cert", "tls_key") if self.tls_key is None else ("tls_key", "tls_cert")
            raise ValueError(f"{given} is {getattr(self, given)} and {missing} is absent; give both, or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError(
                f"tls_client_ca is {self.tls_client_ca} and tls_cert is absent; give tls_cert and tls_key too"
            )
        if self.otel_endpoint is not None and not self.otel_endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otel_endpoint is {self.otel_endpoint!r}; it must be an http:// or https:// URL")
        if not self.name:
            raise ValueError("name is empty; it must have at least one character")
        names = [self.name]
        for text in self.teacher:
            name, _, folder = text.partition("=")
            if not name or not folder or name in names:
                raise ValueError(f"teacher is {text!r}; it must be NAME=FOLDER with a name of its own")
            names.append(name)
        if self.weights_transfer is not None and self.engine != "vllm":
            raise ValueError(
                f"weights_transfer is {self.weights_transfer}; it needs the engine vllm, not {self.engine}"
            )
        if self.weights_root is not None and not self.weights_root.is_dir():
            raise ValueError(f"weights_root is {self.weights_root}; it must be a folder that exists")

    @property
    def adapters(self) -> dict[str, Path]:
        """The folders of `teacher` by name."""
        return {name: Path(folder).expanduser() for name, _, folder in (text.partition("=") for text in self.teacher)}

    @property
    def adapter_slots(self) -> int:
        """How many adapters the engine is built for."""
        return len(self.teacher) if self.max_adapters is None else self.max_adapters


class StartError(Exception):
    """The server cannot start; the message is a sentence for the person who started it."""
