"""Requests that offer to go on in another protocol, such as HTTP/2 without TLS.

A server may ignore the offer (RFC 9110, 7.8). httptools stops reading at the end of such a
request's head, and uvicorn then takes it for a request without a body. Java's HttpClient
offers HTTP/2 with each first request.
"""

from __future__ import annotations

from typing import Any

import httptools

_OFFERS = (b"upgrade", b"http2-settings")
"""The headers that make an offer, and the words for it in the header `connection`."""


class Parser:
    """httptools' parser, which reads a request with an offer once more without it.

    Args:
        protocol: What hears of requests. It must pass over what comes while
            `should_upgrade` is true.
    """

    def __init__(self, protocol: Any) -> None:
        self._protocol = protocol
        self._parser = httptools.HttpRequestParser(protocol)

    def __getattr__(self, name: str) -> Any:
        """What httptools' own parser has besides."""
        return getattr(self._parser, name)

    def feed_data(self, data: bytes) -> None:
        """Read what has come.

        Raises:
            httptools.HttpParserError: If it is no HTTP.
        """
        while data:
            try:
                self._parser.feed_data(data)
                data = b""
            except httptools.HttpParserUpgrade as offer:
                head = self._head()
                self._parser = httptools.HttpRequestParser(self._protocol)
                data = head + data[offer.args[0] :]

    def _head(self) -> bytes:
        """The head of the present request, without its offer."""
        method = self._parser.get_method()
        if method == b"CONNECT":
            raise httptools.HttpParserInvalidMethodError("CONNECT is for proxies")
        version = self._parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (method, self._protocol.url, version)]
        for name, value in self._protocol.headers:
            if name == b"connection":
                words = [word.strip() for word in value.split(b",")]
                value = b", ".join(word for word in words if word.lower() not in _OFFERS)
            if name not in _OFFERS:
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])
