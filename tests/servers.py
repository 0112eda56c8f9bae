"""Servers for tests that pip cannot install: the distribution's PostgreSQL, which has TLS. ``nox -s tests-services`` installs it."""

from __future__ import annotations

import datetime
import ipaddress
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tenantdb.testing.postgres import EmbeddedServer


def debian_bindir() -> Path:
    """The programs of the newest PostgreSQL that Debian installed; TEST_POSTGRES_BINDIR, which nox sets, goes first."""
    if chosen := os.environ.get("TEST_POSTGRES_BINDIR"):
        return Path(chosen)
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda initdb: int(initdb.parents[1].name))
    if not found:
        raise FileNotFoundError(
            "no /usr/lib/postgresql/*/bin/initdb: run `nox -s tests-services`, or name the folder in TEST_POSTGRES_BINDIR"
        )
    return found[-1].parent


@contextmanager
def tls_server() -> Iterator[tuple[EmbeddedServer, Path]]:
    """A server with a certificate for localhost and 127.0.0.1, and the file of the private authority that signed it."""
    with tempfile.TemporaryDirectory(prefix="tenantdb-tls-") as folder:
        authority, certificate, key = make_certificates(Path(folder))
        with EmbeddedServer(bindir=debian_bindir(), ssl=(certificate, key), fsync=False) as server:
            yield server, authority


def make_certificates(folder: Path) -> tuple[Path, Path, Path]:
    """Make a private authority and a certificate of its for localhost and 127.0.0.1: ca.crt, server.crt and server.key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = datetime.datetime.now(datetime.timezone.utc)

    def builder(subject: str, issuer: str, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        )

    def usage(*, signs_certificates: bool) -> x509.KeyUsage:
        return x509.KeyUsage(
            digital_signature=not signs_certificates,
            key_cert_sign=signs_certificates,
            crl_sign=signs_certificates,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = (
        builder("tenantdb test authority", "tenantdb test authority", ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage(signs_certificates=True), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        builder("localhost", "tenantdb test authority", key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    files = (folder / "ca.crt", folder / "server.crt", folder / "server.key")
    files[0].write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files[2].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    files[2].chmod(0o600)
    return files
