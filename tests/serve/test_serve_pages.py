"""The pages of serving: what a newcomer types works, and the configurations are taken."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from serve_clients import server
from waiting import LONG

from onnx_adapt.cli.serve import command
from onnx_adapt.serve import build_app
from onnx_adapt.serve.settings import read_settings

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = (DOCS / "serving.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_a_newcomer_gets_from_the_page_to_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests").symlink_to(Path(__file__).parent.parent)
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-c", *blocks("python")], check=True)
    serve, curls = blocks("sh")
    assert serve == "onnx-adapt serve adapted.onnx --adapters adapters\n"
    (client,) = blocks("py")
    with server(tmp_path / "adapted.onnx", tmp_path / "adapters") as served:
        here = curls.replace("localhost:8000", served.address).replace("curl", "curl -s")
        done = subprocess.run(["sh", "-ec", here], check=True, capture_output=True)
        about, answer = re.findall(r"\{.*?\}(?=\{\"model|$)", done.stdout.decode())
        assert json.loads(about)["name"] == "fr"
        (logits,) = json.loads(answer)["outputs"]
        assert (logits["name"], logits["shape"]) == ("logits", [1, 3])
        code = client.replace("localhost:8000", served.address)
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        lines = done.stdout.decode().splitlines()
        assert len(lines) == len(set(lines)) == 3


def test_the_serve_config_is_one_that_ray_takes(tmp_path: Path) -> None:
    config = yaml.safe_load((DOCS / "serving/config.yaml").read_text(encoding="utf-8"))
    ServeDeploySchema.model_validate(config)
    (app,) = config["applications"]
    assert read_settings(app["args"]).max_adapters == 100
    assert app["import_path"] == f"{build_app.__module__}:{build_app.__name__}"


def test_the_kuberay_manifest_holds_a_config_that_ray_takes() -> None:
    manifest = yaml.safe_load((DOCS / "serving/rayservice.yaml").read_text(encoding="utf-8"))
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    assert read_settings(config["applications"][0]["args"]).replicas == 2


def test_what_runs_a_server_elsewhere_gives_options_that_there_are() -> None:
    folder = DOCS / "serving"
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", (folder / "Dockerfile").read_text(), re.M)
    manifest = yaml.safe_load((folder / "deployment.yaml").read_text())
    (pod,) = manifest["spec"]["template"]["spec"]["containers"]
    unit = re.findall(r"^ExecStart=(.*)$", (folder / "onnx-adapt.service").read_text(), re.M)
    known = {option for each in command.params for option in each.opts}
    program, *words = json.loads(entry)
    assert (program, words[0]) == ("onnx-adapt", "serve")
    for line in (words, pod["args"], unit[0].split()):
        assert {word for word in line if word.startswith("--")} <= known
    probes = {pod[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness")}
    assert probes == {"/v2/health/ready"}
    assert pod["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"


def test_build_app_takes_what_serve_run_gives(tmp_path: Path) -> None:
    from session_adapters import adapted_file

    (tmp_path / "adapters").mkdir()
    given = {"model": str(adapted_file(tmp_path)), "adapters": str(tmp_path / "adapters")}
    assert build_app(given | {"replicas": "2"})


def test_the_benchmark_of_serving_finds_no_wrong_answer_and_leaves_no_file(
    tmp_path: Path,
) -> None:
    program = Path(__file__).parent.parent.parent / "benchmarks/serving.py"
    done = subprocess.run(
        [sys.executable, program, "--quick"],
        check=True,
        capture_output=True,
        timeout=LONG,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert list(tmp_path.glob("onnx-adapt-*")) == []
    table = done.stdout.decode()
    print(table)
    assert len(table.splitlines()) == 9
