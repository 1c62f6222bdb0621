"""Other servers with a session for each adapter: what people run who have no slots.

A model for each adapter is loaded, with the adapter's weights as constants. Started with the
Python of the peer's own environment: `peer_serving.py NAME FOLDER PORT`.
"""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


def sessions(folder: Path) -> dict[str, Any]:
    """A session for each model in a folder, of one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return {
        path.stem: onnxruntime.InferenceSession(path, options)
        for path in sorted(folder.glob("*.onnx"))
    }


def run(session: Any, inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """The output of a session for the inputs of a request, as the protocol has them."""
    (tensor,) = inputs
    x = np.array(tensor["data"], np.float32).reshape(tensor["shape"])
    (y,) = session.run(None, {tensor["name"]: x})
    name = session.get_outputs()[0].name
    data = y.ravel().tolist()
    return {"name": name, "datatype": "FP32", "shape": list(y.shape), "data": data}


def fastapi(folder: Path, port: int) -> None:
    """FastAPI: the route of the protocol, and a session called in it."""
    import uvicorn
    from fastapi import FastAPI, Request

    models, app = sessions(folder), FastAPI()

    @app.post("/v2/models/{name}/infer")
    async def infer(name: str, request: Request) -> dict[str, Any]:
        body = await request.json()
        return {"model_name": name, "outputs": [run(models[name], body["inputs"])]}

    uvicorn.run(app, port=port, log_level="warning", access_log=False)


def mlserver(folder: Path, port: int) -> None:
    """MLServer: one model of its own class for each, in one process."""
    from mlserver import MLModel, MLServer, ModelSettings, Settings, types

    found = sessions(folder)

    class Model(MLModel):
        async def load(self) -> bool:
            self.session = found[self.name]
            return True

        async def predict(self, payload: Any) -> Any:
            tensors = [
                {"name": t.name, "shape": t.shape, "data": t.data.root} for t in payload.inputs
            ]
            output = types.ResponseOutput(**run(self.session, tensors))
            return types.InferenceResponse(model_name=self.name, outputs=[output])

    globals()["Model"] = Model  # it is imported by its name

    async def serve() -> None:
        settings = Settings(
            host="127.0.0.1",
            http_port=port,
            grpc_port=port + 1,
            metrics_port=port + 2,
            parallel_workers=0,
            debug=False,
            use_structured_logging=False,
        )
        server = MLServer(settings)
        await server.start([ModelSettings(name=name, implementation=Model) for name in found])

    asyncio.run(serve())


def kserve(folder: Path, port: int) -> None:
    """KServe's ModelServer."""
    from kserve import InferOutput, InferResponse, Model, ModelServer

    class One(Model):  # type: ignore[misc]
        def __init__(self, name: str, session: Any) -> None:
            super().__init__(name)
            self.session, self.ready = session, True

        async def predict(self, payload: Any, *_: Any, **__: Any) -> Any:
            tensors = [
                {"name": t.name, "shape": t.shape, "data": t.data} for t in payload.inputs
            ]
            found = run(self.session, tensors)
            output = InferOutput(
                found["name"], found["shape"], found["datatype"], found["data"]
            )
            return InferResponse(payload.id or "", self.name, [output])

    server = ModelServer(http_port=port, enable_grpc=False, access_log_format=None)
    server.start([One(name, session) for name, session in sessions(folder).items()])


def litserve(folder: Path, port: int) -> None:
    """LitServe: one endpoint, as it has no more; the model is a field of the request."""
    import litserve
    from peer_litserve import Api

    server = litserve.LitServer(Api(folder), accelerator="cpu", workers_per_device=1)
    server.run(port=port, host="127.0.0.1", generate_client_file=False, log_level="warning")


PEERS: dict[str, Callable[[Path, int], None]] = {
    "FastAPI": fastapi,
    "MLServer": mlserver,
    "KServe": kserve,
    "LitServe": litserve,
}

if __name__ == "__main__":
    PEERS[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
