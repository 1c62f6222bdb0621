"""Execution providers: the one that is asked for runs the model, or there is an error.

The wheel for the CPU has two providers, CPU and Azure; the latter leaves every node to the
former. No test here has a GPU.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from slot_models import MLP, cli, model_of, saved

import onnx_adapt as oa
from onnx_adapt.errors import RunError
from onnx_adapt.ort import Provider, read_providers, start_session
from onnx_adapt.proof.runner import in_full_precision, proof_providers
from onnx_adapt.report.overview import overview

X = {"x": np.ones((3, 4), "f4")}


def _names(given: Any) -> list[str]:
    return [provider.name for provider in read_providers(given)]


def _pair() -> tuple[oa.Model, oa.Model]:
    base = model_of(MLP)
    return base, oa.insert(base, after="first")


def _files(folder: Path) -> tuple[str, str]:
    base, adapted = _pair()
    paths = saved(base, folder / "base.onnx"), saved(adapted, folder / "adapted.onnx")
    return str(paths[0]), str(paths[1])


@pytest.mark.parametrize(
    "given", ["cpu", "CPU", "CPUExecutionProvider", ("cpu", {}), None, []]
)
def test_a_provider_goes_by_its_name_or_the_start_of_it(given: Any) -> None:
    assert _names(given) == ["CPUExecutionProvider"]


def test_several_providers_keep_their_order() -> None:
    assert _names(["azure", "cpu"]) == ["AzureExecutionProvider", "CPUExecutionProvider"]
    assert _names(("cpu", "azure")) == ["CPUExecutionProvider", "AzureExecutionProvider"]


@pytest.mark.parametrize("given", ["cpu:a=1,b=x", ("cpu", {"a": 1, "b": "x"})])
def test_options_are_given_in_a_text_or_a_mapping(given: Any) -> None:
    assert read_providers(given)[0].options == (("a", "1"), ("b", "x"))


def test_an_option_without_a_value_is_refused() -> None:
    with pytest.raises(RunError, match="'device_id' is not an option"):
        read_providers("cpu:device_id")


@pytest.mark.parametrize(
    "given", ["cuda", "CUDAExecutionProvider", "nonsense", ["cpu", "cuda"]]
)
def test_a_provider_that_is_not_there_is_an_error_with_those_that_are(given: Any) -> None:
    base, adapted = _pair()
    calls = (
        lambda: oa.verify(base, adapted, provider=given),
        lambda: overview(base, adapted, provider=given),
        lambda: oa.AdapterSession(adapted, providers=given),
    )
    for call in calls:
        with pytest.raises(RunError, match="has no execution provider") as caught:
            call()
        for name in onnxruntime.get_available_providers():
            assert name in caught.value.hint


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_session_that_would_silently_run_on_the_cpu_is_an_error() -> None:
    wanted = (Provider("CUDAExecutionProvider"),)
    data = model_of(MLP).proto.SerializeToString()
    with pytest.raises(RunError, match="CUDAExecutionProvider does not start") as caught:
        start_session(data, None, wanted, label="mlp.onnx", hint="")
    assert "mlp.onnx would run on CPUExecutionProvider" in caught.value.message


def test_a_proof_on_cuda_is_without_tf32_unless_told_otherwise() -> None:
    def options(*given: tuple[str, str]) -> tuple[tuple[str, str], ...]:
        return in_full_precision((Provider("CUDAExecutionProvider", given),))[0].options

    assert options(("device_id", "1")) == (("device_id", "1"), ("use_tf32", "0"))
    assert options(("use_tf32", "1")) == (("use_tf32", "1"),)
    assert proof_providers("cpu") == (Provider("CPUExecutionProvider"),)


@pytest.mark.parametrize("given", ["azure", ["azure", "cpu"], ("cpu", {"a": "b"})])
def test_a_report_names_the_providers_that_it_was_made_on(given: Any) -> None:
    report = oa.verify(*_pair(), inputs=X, provider=given)
    assert report.passed
    assert list(report.providers) == _names(given)


def test_verify_insert_report_check_and_run_take_a_provider(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapted = _files(tmp_path)
    inputs = tmp_path / "x.npz"
    np.savez(inputs, **X)
    commands = (
        ("insert", base, "--after", "first", "-o", str(tmp_path / "new.onnx")),
        ("verify", base, adapted),
        ("report", base, adapted, "--json"),
        ("check", adapted),
        ("run", adapted, "--inputs", str(inputs)),
    )
    for command in commands:
        code, _, err = cli(capsys, *command, "--provider", "azure", "--provider", "cpu")
        assert code == 0, (command, err)
    for command in commands:
        code, _, err = cli(capsys, *command, "--provider", "cuda", "-q")
        assert (code, "no execution provider 'cuda'" in err) == (2, True), command


def test_the_commands_say_where_the_proof_ran(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = _files(tmp_path)
    code, _, err = cli(capsys, "verify", *files)
    assert (code, f"{onnxruntime.__version__} on CPUExecutionProvider" in err) == (0, True)
    code, out, _ = cli(capsys, "verify", *files, "--provider", "azure:a=b", "--json")
    assert (code, json.loads(out)["providers"]) == (0, ["AzureExecutionProvider"])
