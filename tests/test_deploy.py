"""What deploy/ ships: valid by the schemas of what reads it, and run as far as one machine can."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import tokenizers
import typer
import yaml

from ryzanstein_jax import LLM, SamplingParams
from ryzanstein_jax.cli import app
from ryzanstein_jax.orchestrator.coordinator import free_port
from ryzanstein_jax.start import parse_options
from tests.support import GOLDEN

ROOT = Path(__file__).resolve().parents[1]
SBATCH = ROOT / "deploy" / "slurm" / "ryzanstein.sbatch"
MANIFEST = ROOT / "deploy" / "kubernetes" / "leaderworkerset.yaml"
KUBERNETES = "1.30"
#: Options of sbatch that a script may set, and what a value looks like; "" takes none.
SBATCH_OPTIONS = {
    "job-name": r"\w+",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "gpus-per-node": r"(\w+:)?\d+",
    "exclusive": "",
    "no-kill": "",
    "time": r"\d+(:\d\d){1,2}",
    "output": r"\S+",
}
#: Runs the command once for each node of the job, with what Slurm sets in a step.
SRUN = """
import os, signal, subprocess, sys
arguments = sys.argv[1:]
while arguments[0].startswith("--"):
    arguments.pop(0)
nodes = ["localhost", "second"]
tasks = []
for number, node in enumerate(nodes):
    step = {"SLURM_STEP_NODELIST": ",".join(nodes), "SLURM_NTASKS": "2", "SLURM_PROCID": str(number)}
    step |= {"SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURMD_NODENAME": node}
    tasks.append(subprocess.Popen(arguments, env=os.environ | step))
def forward(number, frame):
    for task in tasks:
        task.send_signal(number)
signal.signal(signal.SIGTERM, forward)
sys.exit(max(task.wait() for task in tasks))
"""


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(MANIFEST.read_text()))


def templates() -> dict[str, dict[str, Any]]:
    template = documents()[0]["spec"]["leaderWorkerTemplate"]
    return {"leader": template["leaderTemplate"], "worker": template["workerTemplate"]}


def check_command(command: list[str]) -> None:
    """A command line of `ryzanstein` is one that it takes, as far as that can be told without running it."""
    program, name, *arguments = command
    assert program == "ryzanstein"
    known = typer.main.get_command(app).commands
    assert name in known, name
    context = known[name].make_context(name, list(arguments))
    pairs = context.params.get("orchestrator")
    parse_options([pair for pair in pairs or () if not pair.startswith("secret_file=")] + ["secret_file=f"])


def test_the_manifest_is_a_leader_worker_set() -> None:
    schema = json.loads((ROOT / "tests" / "data" / "leaderworkerset.schema.json").read_text())
    resource = documents()[0]
    jsonschema.validate(resource, schema)
    template = resource["spec"]["leaderWorkerTemplate"]
    assert template["restartPolicy"] == "None"
    broken = json.loads(json.dumps(resource))
    broken["spec"]["leaderWorkerTemplate"]["restartPolicy"] = "Never"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)


@pytest.mark.parametrize("name", ["leader", "worker"])
def test_its_pods_are_pods(name: str) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", **templates()[name]}
    pod["metadata"] = {"name": name, **pod["metadata"]}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    pod["spec"]["containers"][0]["resources"]["limit"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_what_goes_with_it_is_valid() -> None:
    others = documents()[1:]
    assert [other["kind"] for other in others] == ["Service", "NetworkPolicy"]
    for other in others:
        kubernetes_validate.validate(other, KUBERNETES, strict=True)


def test_its_numbers_agree() -> None:
    (leader,) = templates()["leader"]["spec"]["containers"]
    (worker,) = templates()["worker"]["spec"]["containers"]
    size = documents()[0]["spec"]["leaderWorkerTemplate"]["size"]
    gpus = int(worker["resources"]["limits"]["nvidia.com/gpu"])
    assert leader["resources"]["limits"] == worker["resources"]["limits"]
    assert f"--devices={gpus}" in worker["args"]
    assert f"--tensor-parallel-size={gpus * size}" in leader["args"]
    assert f"--orchestrator=num_hosts={size - 1}" in leader["args"]
    ports = {port["name"]: port["containerPort"] for port in leader["ports"]}
    assert f"--port={ports['http']}" in leader["args"] and f"--port={ports['agents']}" in worker["args"]
    assert f"--orchestrator=listen=0.0.0.0:{ports['agents']}" in leader["args"]


def test_a_worker_never_sees_the_keys_of_the_api() -> None:
    (volume,) = [v for v in templates()["worker"]["spec"]["volumes"] if v["name"] == "secret"]
    assert [item["key"] for item in volume["secret"]["items"]] == ["secret"]
    assert volume["secret"]["defaultMode"] == 0o440


def test_its_worker_s_command_is_one() -> None:
    (worker,) = templates()["worker"]["spec"]["containers"]
    check_command(worker["command"] + worker["args"])


def test_the_batch_script_is_one() -> None:
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    options = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", SBATCH.read_text(), re.MULTILINE)
    assert len(options) == len(re.findall("^#SBATCH", SBATCH.read_text(), re.MULTILINE)) > 5
    for name, value in options:
        assert re.fullmatch(SBATCH_OPTIONS[name], value), name
    assert ("no-kill", "") in options  # else Slurm ends the job with the first node that fails
    (worker,) = re.findall(r"^ *(ryzanstein worker .*?) &$", SBATCH.read_text(), re.MULTILINE | re.DOTALL)
    words = [{"$1": "1", "$3": "1"}.get(word, word) for word in shlex.split(worker.replace("\\\n", " "))]
    check_command(words)


def test_the_batch_script_without_a_command_says_how(tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(SBATCH)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "usage: sbatch" in done.stderr


def test_a_job_of_two_nodes(tmp_path: Path) -> None:
    """The script itself, with a `srun` that starts its tasks here: two workers find the leader as Slurm tells it."""
    model, tools, secrets = tmp_path / "model", tmp_path / "bin", tmp_path / "home"
    for folder in (model, tools, secrets):
        folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_bytes((GOLDEN / "llama" / name).read_bytes())
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    words = {f"<{number}>": number for number in range(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<0>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(model / "tokenizer.json"))
    for name, command in (("srun", f"{tools}/srun.py"), ("ryzanstein", "-m ryzanstein_jax.cli")):
        command = f"{sys.executable} {command}"
        (tools / name).write_text(f'#!/bin/bash\nexec {command} "$@"\n')
        (tools / name).chmod(0o755)
    (tools / "srun.py").write_text(SRUN)
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": "71",
        "SLURM_JOB_NUM_NODES": "2",
        "RYZANSTEIN_LISTEN": "127.0.0.1",
        "RYZANSTEIN_PORT": str(free_port()),
        "RYZANSTEIN_SECRET_DIR": str(secrets),
    }
    prompt, count = "<3> <4> <5>", 8
    command = ["bash", str(SBATCH), "generate", str(model), "--prompt", prompt, "--max-tokens", str(count)]
    command += ["--temperature", "0", "--json", "--max-model-len", "32"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert {f"as {node} with 1 device" in done.stderr for node in ("localhost", "second")} == {True}, done.stderr
    record = json.loads(done.stdout)
    with LLM(str(model), max_num_seqs=1, max_model_len=32, progress=False) as llm:
        (expected,) = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=count), use_tqdm=False)
    assert record["token_ids"] == expected.outputs[0].token_ids and len(record["token_ids"]) > 0
    assert list(secrets.iterdir()) == []
