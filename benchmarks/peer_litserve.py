"""What LitServe serves, in a module of its own: it starts processes that import it."""

from pathlib import Path
from typing import Any

import litserve
from peer_serving import run, sessions


class Api(litserve.LitAPI):
    """A session for each model in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def setup(self, device: str) -> None:
        """Load the models in the process that runs them."""
        self.sessions = sessions(self._folder)

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        """Take a request as it is."""
        return request

    def predict(self, x: dict[str, Any]) -> dict[str, Any]:
        """Run the model that the request names."""
        return run(self.sessions[x["model"]], x["inputs"])

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Answer in the words of the protocol."""
        return {"outputs": [output]}
