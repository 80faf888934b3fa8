"""The command line as a person types it: an hour's worth of mistakes, each one clear line and an exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.jobs.conftest import InitSigning, Run

Document = Callable[..., dict[str, Any]]


@pytest.fixture
def spec(tiny_document: Document, tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tiny_document(store__uri=str(tmp_path / "store"))))
    return path


@pytest.fixture(scope="module")
def store(tiny_checkpoint: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with version 1 of ``tiny``."""
    from jobs.driver import run_job
    from jobs.spec.file import parse_spec
    from tests.integration.test_job import whole_document
    from workers.executor import InProcessExecutor

    uri = tmp_path_factory.mktemp("cli") / "store"
    document = whole_document(tiny_checkpoint, tiny_images, str(uri))
    run_job(parse_spec(document, where="test"), InProcessExecutor())
    return uri


def test_quantize_prints_one_document_with_json(nestquant: Run, spec: Path) -> None:
    code, out, err = nestquant("quantize", spec, "--local", "--json", "--set", "evaluate.limit=10")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert (result["name"], result["version"], result["bits"]) == ("tiny", 1, [8, 4])
    assert [one["total"] for one in result["measured"]] == [10] * 5
    assert result["stored_bits_per_weight"] == pytest.approx(
        8 * sum(result["sizes"]["level_bytes"]) / result["sizes"]["weights"]
    )


def test_quantize_prints_a_table_for_people(nestquant: Run, spec: Path) -> None:
    code, out, err = nestquant("quantize", spec, "--local")
    assert code == 0
    assert "tiny version 1 published, tagged latest" in out
    assert "top-1 %, weights quantized" in out
    assert "seconds by stage: validate" in out
    assert "measure what was pulled" in err


def test_dry_run_writes_nothing_and_lists_everything(nestquant: Run, spec: Path, tmp_path: Path) -> None:
    code, out, _ = nestquant("quantize", spec, "--dry-run", "--set", "quantize.ignore=[fc]", "--json")
    plan = json.loads(out)
    assert code == 0
    assert {"name": "fc", "reason": "ignored by the spec (fc)"} in plan["kept_float"]
    assert plan["weights"] == sum(
        int(layer["shape"][0]) * int(layer["shape"][1]) * int(layer["shape"][2]) * int(layer["shape"][3])
        for layer in plan["layers"]
    )
    assert list((tmp_path / "store").rglob("*.json")) == []


@pytest.mark.parametrize(
    "words",
    [
        ["pull", "tiny", "--allow-unsigned"],
        ["upgrade", "tiny"],
        ["ls"],
        ["inspect", "tiny"],
        ["analyze", "tiny"],
        ["export", "tiny", "--engine", "onnx"],
        ["bundle", "tiny", "-o", "x.tar"],
        ["catalog", "--out", "site"],
        ["jobs", "ls"],
        ["jobs", "status", "3f9a2c"],
        ["keys", "show"],
        ["keys", "renew", "--root-key", "root.pem"],
        ["gc"],
        ["fsck"],
    ],
    ids=" ".join,
)
def test_a_store_folder_that_is_not_there_is_named_and_nothing_is_made(
    nestquant: Run, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = nestquant(*words, "--store", "stoer")
    assert (code, out) == (2, "")
    assert err.startswith("nestquant: ")
    assert len(err.splitlines()) == 1
    assert f"no such folder ({tmp_path / 'stoer'})" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["quantize", "nowhere.yaml"], 2, "nestquant: No spec at nowhere.yaml: there is no such file."),
        (["quantise"], 2, "No such command 'quantise'"),
        (["pull"], 2, "Missing argument 'NAME[@REF]'"),
        (["ls"], 2, "Missing option '--store'"),
        (["ls", "--store", "ftp://host"], 2, "ftp"),
        (
            ["ls", "--store", "s3:/bucket"],
            2,
            "'://' must stand behind the scheme; write 's3://bucket'",
        ),
        (["ls", "--store", "s3://bucket?endpoint=http://x"], 2, "endpoint_url"),
        (["ls", "--store", "s3://key:secret@bucket"], 2, "no credentials in a URI"),
        (["upgrade", "tiny", "--store", "memory://x", "--cache", "no-cache"], 1, "tiny is not in"),
        (["upgrade", "tiny", "--store", "/nowhere/store", "--cache", "no-cache"], 2, "no such folder (/nowhere/store)"),
        (["evaluate", "tiny", "--data", "x.tar"], 2, "give one of --store and --cache"),
        (["sign", "tiny", "--key", "no.pem", "--store", "memory://x"], 1, "key no.pem: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(  # noqa: PLR0917 - pytest gives them by name
    nestquant: Run, words: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen, out, err = nestquant(*words)
    assert seen == code
    assert message in err
    assert err.startswith("nestquant: ")
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err + out


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ("model.arch=resnet81", 1, "timm has no model 'resnet81'. Did you mean"),
        ("model.checkpoint=/nowhere.safetensors", 1, "No file at /nowhere.safetensors"),
        ("calibration.data=/nowhere.tar", 1, "No images at /nowhere.tar: there is no such file or folder"),
        ("quantize.bits=[4,8]", 2, "expected widths from 1 to 8 that count down"),
        ("quantise.bits=[8,4]", 2, "unknown key 'quantise'. Did you mean 'quantize'?"),
        ("quantize.ignore=[nothing*]", 2, "matches none of the"),
        ("store.uri=/proc/nowhere", 1, "/proc/nowhere"),
        (
            "model.kwargs={num_classes: 11, in_chans: 3}",
            1,
            "the checkpoint has 10 classes; set kwargs: {num_classes: 10}",
        ),
        ("nonsense", 2, "expected KEY=VALUE"),
    ],
)
def test_a_wrong_value_in_the_spec_names_the_key(
    nestquant: Run, spec: Path, change: str, code: int, message: str
) -> None:
    seen, _, err = nestquant("quantize", spec, "--local", "--set", change)
    assert (seen, message in err) == (code, True), err
    assert "Traceback" not in err


def test_errors_are_json_where_json_was_asked(nestquant: Run) -> None:
    code, out, err = nestquant("quantize", "nowhere.yaml", "--json")
    assert out == ""
    assert json.loads(err) == {"error": "No spec at nowhere.yaml: there is no such file.", "exit_code": code}


def test_the_gate_has_an_exit_code_of_its_own(nestquant: Run, spec: Path) -> None:
    code, _, err = nestquant("quantize", spec, "--local", "--set", "evaluate.min_part_top1=99.9")
    assert code == 5
    assert "tiny version 1 is stored, but not tagged: part-bit top-1 is" in err


def test_a_device_session(nestquant: Run, store: Path, tmp_path: Path) -> None:
    cache = ["--cache", str(tmp_path / "cache")]
    source = ["--store", str(store)]
    code, _, err = nestquant("pull", "tiny", *source, *cache)
    assert code == 4
    assert "--allow-unsigned" in err or "--trust" in err
    code, out, _ = nestquant("pull", "tiny@1", *source, *cache, "--allow-unsigned", "--json")
    pulled = json.loads(out)
    assert (code, pulled["level"], pulled["version"]) == (0, 0, 1)
    code, out, _ = nestquant("upgrade", "tiny", *source, *cache, "--level", "1", "--json")
    assert (code, json.loads(out)["level"]) == (0, 1)
    code, out, _ = nestquant("upgrade", "tiny", *source, *cache)
    assert code == 0
    assert "tiny version 1 runs full-bit (unsigned)" in out
    code, out, _ = nestquant("verify", "tiny", *cache)
    assert (code, "whole" in out) == (0, True)
    code, out, _ = nestquant("downgrade", "tiny", *cache, "--json")
    assert code == 0
    assert json.loads(out)["freed_bytes"] > 0
    blob = max((tmp_path / "cache").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    damaged = bytearray(blob.read_bytes())
    damaged[100] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(damaged)
    code, _, err = nestquant("verify", "tiny", *cache, "--discard")
    assert code == 4
    assert "the file's SHA-256 is" in err
    code, _, _ = nestquant("pull", "tiny", *source, *cache, "--allow-unsigned")
    assert code == 0
    assert nestquant("verify", "tiny", *cache)[0] == 0
    assert nestquant("remove", "tiny", *cache)[0] == 0


def test_signed_from_keys_to_device(nestquant: Run, signing: InitSigning, store: Path, tmp_path: Path) -> None:
    source, cache = ["--store", str(store)], ["--cache", str(tmp_path / "cache")]
    signer = signing(store)
    trust = ["--trust", str(signer.trust)]
    assert nestquant("pull", "tiny", *source, *cache, *trust)[0] == 4
    assert nestquant("sign", "tiny", "--tag", "latest=1", *signer.options, *source)[0] == 0
    code, out, _ = nestquant("pull", "tiny", *source, *cache, *trust, "--json")
    assert (code, json.loads(out)["signed"]) == (0, True)
    shown = json.loads(nestquant("keys", "show", *source, "--json")[1])
    (publisher,) = shown["roles"]["publisher"]
    assert nestquant("keys", "generate", signer.key("next"))[0] == 0
    rotate = ["keys", "rotate", publisher[:12], signer.public("next"), *source, "--root-key", signer.key("root")]
    assert nestquant(*rotate)[0] == 0
    assert nestquant("sign", "tiny", "--tag", "latest=1", *signer.options, *source)[0] == 1
    again = ["--key", signer.key("next"), "--key", signer.key("online")]
    assert nestquant("sign", "tiny", "--afresh", "--tag", "latest=1", *again, *source)[0] == 0
    assert nestquant("pull", "tiny", *source, *cache)[0] == 0


def test_looking_after_a_store(nestquant: Run, store: Path) -> None:
    source = ["--store", str(store)]
    code, out, _ = nestquant("ls", *source, "--json")
    assert (code, json.loads(out)) == (0, [{"name": "tiny", "tags": {"latest": 1}, "versions": [1]}])
    code, out, _ = nestquant("inspect", "tiny", *source)
    assert code == 0
    assert "conv1.0" in out
    assert "top-1 part-bit" in out
    code, out, _ = nestquant("fsck", *source, "--json")
    assert (code, json.loads(out)["problems"]) == (0, [])
    code, out, _ = nestquant("doctor", *source, "--json")
    assert (code, json.loads(out)["healthy"]) == (0, True)
    code, out, _ = nestquant("gc", *source, "--json")
    assert (code, json.loads(out)["removed"], json.loads(out)["dry_run"]) == (0, [], True)
    code, _, err = nestquant("inspect", "tiny@7", *source)
    assert code == 1
    assert "no version 7" in err


def test_evaluate_from_store_and_offline_from_a_device(
    nestquant: Run, store: Path, tiny_images: Path, tmp_path: Path
) -> None:
    code, out, _ = nestquant("evaluate", "tiny", "--store", store, "--data", tiny_images, "--json")
    assert code == 0
    online = {(one["level"], one["activations"]): one["correct"] for one in json.loads(out)["measured"]}
    assert set(online) == {(level, quantized) for level in (0, 1, 2) for quantized in (False, True)}
    assert nestquant("pull", "tiny", "--store", store, "--cache", tmp_path / "c", "--allow-unsigned")[0] == 0
    code, out, _ = nestquant("evaluate", "tiny", "--cache", tmp_path / "c", "--data", tiny_images, "--json")
    offline = {(one["level"], one["activations"]): one["correct"] for one in json.loads(out)["measured"]}
    assert (code, offline) == (0, {mode: right for mode, right in online.items() if mode[0] == 0})


def test_every_command_has_an_example(nestquant: Run) -> None:
    groups: dict[str, list[str]] = {"": [], "keys": [], "jobs": [], "zoo": []}
    for prefix in groups:
        code, out, _ = nestquant(*prefix.split(), "--help")
        assert code == 0
        listed = out.partition("Commands:\n")[2].partition("\n\n")[0]
        groups[prefix] = [line.split()[0] for line in listed.splitlines() if line[2] != " "]
    assert {"quantize", "pull", "upgrade", "downgrade", "verify", "inspect", "evaluate", "ls"} <= set(groups[""])
    assert {"generate", "init", "rotate", "revoke"} <= set(groups["keys"])
    for prefix, names in groups.items():
        for name in names:
            if name not in groups:
                _, out, _ = nestquant(*prefix.split(), name, "--help")
                assert "Example: nestquant" in out, (prefix, name)


def test_a_target_on_the_command_line_takes_the_place_of_the_spec_s(nestquant: Run, spec: Path) -> None:
    document = yaml.safe_load(spec.read_text())
    document["quantize"] = {
        "recipe": "paper",
        "bits": [8, 4],
        "ignore": ["layer*"],
        "mixed": {"mean_bits": 4.0, "samples": 8},
    }
    spec.write_text(yaml.safe_dump(document))
    code, out, _ = nestquant("quantize", spec, "--local", "--json", "--target-bytes", 6000)
    assert code == 0
    mixed = json.loads(out)["mixed"]
    assert mixed["level_bytes"] <= 6000
    assert mixed["mean_bits"] > 4
    code, _, err = nestquant("quantize", spec, "--local", "--target-bytes", 6000, "--mean-bits", 4)
    assert (code, "give one of --mean-bits, --target-bytes and --max-drop" in err) == (2, True)
    code, out, _ = nestquant("quantize", spec, "--dry-run")
    assert code == 0
    assert [line.split()[7] for line in out.splitlines() if line.startswith("│ conv1.0")] == ["8|3,4,5,6"]
    assert "High bits in the plural are for the job to choose" in out


def test_analyze_measures_a_spec_and_reads_about_a_version(
    nestquant: Run, spec: Path, store: Path, tmp_path: Path
) -> None:
    chosen = ("--set", "quantize.ignore=[layer*]", "--local", "--bits", "2,8", "--samples", 8)
    code, out, err = nestquant("analyze", spec, *chosen, "--json")
    assert code == 0, err
    told = json.loads(out)
    rows = [(layer["name"], tuple(layer["bits"])) for layer in told["layers"]]
    names = ("conv1.0", "conv1.3", "conv1.6", "fc")
    assert rows == [(name, bits) for name in names for bits in ((8, 2), (8, 4), (8,))]
    assert {layer["damage"]["images"] for layer in told["layers"]} == {8}
    narrow, own, whole = (layer["damage"]["divergence"] for layer in told["layers"][:3])
    assert narrow > own > whole > 0
    assert not (tmp_path / "store" / "models").exists()
    code, out, _ = nestquant("analyze", spec, *chosen)
    assert code == 0
    assert "the layer alone part-bit, on 8 calibration images" in out

    code, out, _ = nestquant("analyze", "tiny", "--store", store)
    assert code == 0
    assert "KL, same answers and top-1 were not measured" in out
    code, out, _ = nestquant("analyze", "tiny@1", "--store", store, "--json")
    (first, *_) = json.loads(out)["layers"]
    assert (first["bits"], len(first["flips"]), len(first["level_bytes"])) == ([8, 6, 4], 3, 3)
    code, _, err = nestquant("analyze", "tiny", "--store", store, "--bits", "4")
    assert (code, "are for a spec" in err) == (2, True)
    code, _, err = nestquant("analyze", spec, "--local", "--bits", "4,x")
    assert (code, "--bits '4,x': expected widths from 1 to 8" in err) == (2, True)


def test_device_commands_import_neither_torch_nor_numpy() -> None:
    script = (
        "import sys; import jobs.cli.main, storage.device; "
        "print([name for name in ('torch', 'ray', 'numpy', 'boto3', 'timm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_control_c_says_so_and_the_next_run_completes(spec: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.cli.main", "quantize", str(spec), "--local"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "store").rglob("blobs/*/*/*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert "Traceback" not in err
    if running.returncode != 0:  # else it was faster than the signal
        assert running.returncode == 130
        assert err.strip().splitlines()[-1] == (
            "nestquant: Interrupted. Nothing is half-written; the same command goes on where it stopped."
        )
    again = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, env=environment)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["version"] == 1


def test_what_a_manifest_says_is_shown_and_never_obeyed(nestquant: Run, store: Path, tmp_path: Path) -> None:
    """Names and reasons of a stranger's version: rich's markup as it stands, no escape sequence."""
    from storage.manifest import FloatRecord
    from storage.registry import Registry
    from storage.stores.uri import open_store

    registry = Registry(open_store(store))
    manifest = registry.resolve("tiny", 1).manifest
    hostile = "[red]x[/] :smile: \x1b]0;title\x07\x1b[2J\u202e"
    draft = manifest.model_copy(
        update={
            "name": "hostile",
            "kept_float": (FloatRecord(name="[link=file:///etc]a[/]", reason=hostile),),
            "model": manifest.model.model_copy(update={"arch": hostile}),
        }
    )
    registry.publish(draft)
    code, out, err = nestquant("inspect", "hostile@1", "--store", store)
    assert (code, err) == (0, "")
    assert "[red]x[/] :smile: \ufffd]0;title\ufffd\ufffd[2J\ufffd" in out
    assert "[link=file:///etc]a[/]" in out
    assert not {"\x1b", "\x07", "\u202e"} & {*out}


def test_a_device_without_credentials_pulls_by_an_index_of_urls(
    nestquant: Run, tiny_document: Document, moto_s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.driver import run_job
    from jobs.spec.file import parse_spec
    from workers.executor import InProcessExecutor

    uri, index, cache = moto_s3.uri(), tmp_path / "index.json", tmp_path / "cache"
    run_job(
        parse_spec(
            tiny_document(store__uri=uri, evaluate=None, calibration=None, quantize__activations=None), where="t"
        ),
        InProcessExecutor(),
    )
    code, out, err = nestquant("presign", "tiny", "--store", uri, "--hours", "1", "-o", index)
    assert (code, err) == (0, "")
    assert f"URLs of tiny version 1, for 1 h: nestquant pull tiny@1 --store presigned:{index}" in out
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for ref in ("tiny@1", "tiny"):
        code, out, err = nestquant("pull", ref, "--store", f"presigned:{index}", "--cache", cache, "--allow-unsigned")
        assert code == 0, err
    code, out, err = nestquant("upgrade", "tiny", "--store", f"presigned:{index}", "--cache", cache)
    assert code == 0, err

    code, _, err = nestquant("presign", "tiny", "--store", tmp_path / "folder", "-o", index)
    assert code == 2
    assert "only an s3:// store presigns URLs" in err
