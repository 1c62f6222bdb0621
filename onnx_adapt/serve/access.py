"""Who may use a server, and over which connections: a bearer token, and TLS."""

from __future__ import annotations

import hmac
import ssl
from dataclasses import dataclass
from pathlib import Path

from onnx_adapt.errors import RequestError

_SHORTEST = 16
"""Characters of a token that nobody guesses."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who may use a server, and over which connections.

    Attributes:
        token: What clients must send as `Authorization: Bearer TOKEN`, or '' for nothing.
        certificate: The path of the certificates for TLS, or '' for connections without.
        key: The path of their private key; '' if it is in the same file.
    """

    token: str = ""
    certificate: str = ""
    key: str = ""

    def allows(self, authorization: bytes) -> bool:
        """Whether somebody who sends this may use the server.

        Example:
            >>> Access("0123456789abcdef").allows(b"bearer 0123456789abcdef")
            True
            >>> Access("0123456789abcdef").allows(b"Bearer 0123")
            False
        """
        if not self.token:
            return True
        scheme, _, given = authorization.partition(b" ")
        known = hmac.compare_digest(given.strip(), self.token.encode())
        return known and scheme.lower() == b"bearer"


ANYBODY = Access()
"""No token is needed, and connections are not encrypted."""


def read_access(token_file: str = "", certificate: str = "", key: str = "") -> Access:
    """Who may use a server, out of files.

    Args:
        token_file: A file with the token, or '' for none.
        certificate: A file with certificates, or '' for no TLS.
        key: A file with their private key, or ''.

    Raises:
        RequestError: If a file cannot be read, or does not hold what it should.
    """
    if key and not certificate:
        raise RequestError("a private key needs a certificate", hint="give --ssl-certfile")
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # Without a password OpenSSL would ask for one at the terminal.
            context.load_cert_chain(certificate, key or None, password="")
        except (OSError, ValueError) as error:
            files = " and ".join(filter(None, (certificate, key)))
            raise RequestError(
                f"{files}: no certificate with its private key: {error}",
                hint="PEM files, the key without a password",
            ) from error
    return Access(_read_token(token_file) if token_file else "", certificate, key)


def _read_token(path: str) -> str:
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except OSError as error:
        raise RequestError(
            f"{path} cannot be read: {error.strerror}", hint="--token-file takes a file"
        ) from error
    except ValueError:  # not ASCII: no token either
        token = ""
    if len(token) < _SHORTEST or len(token.split()) != 1:
        raise RequestError(
            f"{path} holds no token",
            hint=f"one line of {_SHORTEST} characters or more, without spaces",
        )
    return token
