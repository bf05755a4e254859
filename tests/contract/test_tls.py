"""TLS and mTLS on both listeners, under a certificate authority of the test's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from protos.client import connect
from protos.credentials import Tls
from protos.errors import InvalidRequest, NotReady
from teacher_server.config import StartError
from teacher_server.engines.base import Engine
from teacher_server.tls import ServerTls
from tests.authority import Authority
from tests.harness import LoopThread, core_over, serving

SECURE = {"http": "https://", "grpc": "grpcs://"}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "own")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "stranger")


def test_tls_with_a_private_authority(
    run: LoopThread,
    scheme: str,
    transformers_engine: Engine,
    tiny_model: Path,
    authority: Authority,
    stranger: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        core = core_over(transformers_engine, tiny_model)
        async with serving(core, tls=ServerTls(*authority.server)) as server:
            assert server.url(scheme).startswith(SECURE[scheme])
            async with server.connect(scheme, tls=Tls(ca=authority.ca)) as teacher:
                assert (await teacher.info()).teachers == ("base", "same")
            async with server.connect(scheme) as teacher:  # the authority of TEACHER_CA
                assert (await teacher.info()).teachers == ("base", "same")
            for tls in (Tls(), Tls(ca=stranger.ca)):
                async with server.connect(scheme, tls=tls) as teacher:
                    with pytest.raises(NotReady, match=r"(?i)certificate.verify.failed"):
                        await teacher.info()
            plain = server.url(scheme).replace(SECURE[scheme], f"{scheme}://")
            async with connect(plain) as teacher:
                with pytest.raises(NotReady):
                    await teacher.info()

    monkeypatch.setenv("TEACHER_CA", str(authority.ca))
    run(scenario())


def test_mtls_refuses_a_client_without_a_certificate_of_its_authority(
    run: LoopThread,
    scheme: str,
    transformers_engine: Engine,
    tiny_model: Path,
    authority: Authority,
    stranger: Authority,
) -> None:
    async def scenario() -> None:
        core = core_over(transformers_engine, tiny_model)
        async with serving(core, tls=ServerTls(*authority.server, client_ca=authority.ca)) as server:
            trusted = Tls(authority.ca, *authority.client)
            async with server.connect(scheme, tls=trusted) as teacher:
                assert (await teacher.info()).teachers == ("base", "same")
            for tls in (Tls(ca=authority.ca), Tls(authority.ca, *stranger.client)):
                async with server.connect(scheme, tls=tls) as teacher:
                    with pytest.raises(NotReady, match="cannot be reached or broke off"):
                        await teacher.info()

    run(scenario())


def test_a_server_s_file_that_cannot_be_used_is_named(
    authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    cert, key = authority.server
    good = ServerTls(cert, key, authority.ca)
    good.grpc_credentials()
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    for wrong, words in (
        (replace(good, key=stranger.server[1]), f"cannot use --tls-cert {cert} with --tls-key .*: key values mismatch"),
        (replace(good, cert=tmp_path / "absent"), "--tls-cert .*absent .*No such file"),
        (replace(good, key=nonsense), "--tls-key .*nonsense"),
        (replace(good, client_ca=nonsense), "cannot use --tls-client-ca .*nonsense"),
        (replace(good, key=_encrypted(key, tmp_path)), "--tls-key .*encrypted"),
    ):
        with pytest.raises(StartError, match=words):
            wrong.grpc_credentials()


def _encrypted(key: Path, folder: Path) -> Path:
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    path = folder / "encrypted.key"
    opened = load_pem_private_key(key.read_bytes(), None)
    path.write_bytes(opened.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))
    return path


@pytest.mark.parametrize("url", ["grpcs://127.0.0.1:1", "https://127.0.0.1:1"])
def test_a_client_s_file_that_cannot_be_used_is_named(url: str, authority: Authority, stranger: Authority) -> None:
    for tls, words in (
        (Tls(ca="/no/such/ca.pem"), "cannot use the CA certificate /no/such/ca.pem: No such file"),
        (Tls(ca=authority.client[1]), "cannot use the CA certificate"),
        (Tls(cert=authority.client[0]), "only one of cert and key; give both"),
        (Tls(cert=authority.client[0], key=stranger.client[1]), "key values mismatch"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            connect(url, tls=tls)
