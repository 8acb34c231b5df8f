"""The files of `cluster/` against the schemas of what reads them, each other, and the versions of constraints.txt."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import crd
import jsonschema
import pytest
import yaml
from ray._raylet import NODE_MARKET_TYPE_ENV, RAY_NODE_MARKET_TYPE_KEY

from ray_ensemble.cli import main
from ray_ensemble.config import load_config
from ray_ensemble.runtime import MARKET_TYPE
from ray_ensemble.version import __version__

REPOSITORY = Path(__file__).parents[2]
CLUSTER = REPOSITORY / "cluster"
MANIFESTS = crd.manifests()
CUSTOM = [name for name, document in MANIFESTS.items() if document["kind"] in crd.KINDS]
CLOUDS = ["aws.yaml", "gcp.yaml"]


def pinned() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def faults(document: Any, schema: Any) -> list[str]:
    found = jsonschema.Draft7Validator(schema).iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


def walk(value: Any, path: tuple = ()):
    """Every key and scalar of a document, with where it stands."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from walk(item, (*path, key))
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from walk(item, (*path, place))
    else:
        yield path, value


def cluster_spec(name: str) -> dict[str, Any]:
    spec = MANIFESTS[name]["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(name: str) -> dict[str, dict[str, Any]]:
    spec = cluster_spec(name)
    groups = {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    return {"head": spec["headGroupSpec"]["template"], **groups}


# Kubernetes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CUSTOM)
def test_manifests_fit_kuberays_schema(name):
    schema = json.loads(crd.REDUCED.read_text())[MANIFESTS[name]["kind"]]
    assert faults(MANIFESTS[name], schema) == []


@pytest.mark.parametrize("name", CUSTOM)
def test_manifests_fit_kuberays_full_schema(name):
    folder = crd.full_schemas()
    if folder is None:
        pytest.skip("KubeRay's schemas are not on this machine (RAY_ENSEMBLE_SCHEMAS names their folder)")
    assert faults(MANIFESTS[name], crd.whole(folder, MANIFESTS[name]["kind"])) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "enableInTreeAutoscaling"), "yes"),
        (("spec", "enableInTreeAutoScaling"), True),
        (("spec", "authOptions", "mode"), "password"),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "workerGroupSpecs", 0, "minReplicas"), "1"),
        (("spec", "workerGroupSpecs", 1, "template", "spec", "tolerations", 0, "effects"), "NoSchedule"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "resources", "limits", "cpu"), [4]),
    ],
)
def test_the_reduced_schema_sees_faults(path, value):
    document = copy.deepcopy(MANIFESTS["raycluster.yaml"])
    at = document
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = value
    assert len(faults(document, json.loads(crd.REDUCED.read_text())["RayCluster"])) == 1


def test_the_job_has_the_cluster_that_stays_and_the_job_file():
    """One place cannot be read by the other, so the two must not drift apart."""
    stays, own = (json.loads(json.dumps(cluster_spec(name))) for name in ("raycluster.yaml", "rayjob.yaml"))
    removed = 0
    for group in (own["headGroupSpec"], *own["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        for holder in (pod, *pod["containers"]):
            for key in ("volumes", "volumeMounts"):
                kept = [item for item in holder.get(key, []) if item["name"] != "job"]
                removed += len(holder.get(key, [])) - len(kept)
                if key in holder:
                    holder[key] = kept
    assert own == stays
    assert removed == 2 * 3
    job = MANIFESTS["rayjob.yaml"]["spec"]
    assert shlex.split(job["entrypoint"]) == ["ray-ensemble", "run", "/job/job.yaml", "--output", "/runs/first"]


@pytest.mark.parametrize("name", CUSTOM)
def test_heads_do_no_work_and_workers_come_and_go(name):
    spec = cluster_spec(name)
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    assert spec["enableInTreeAutoscaling"] is True
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    for group in groups.values():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert all(c["resources"]["limits"]["nvidia.com/gpu"] == "1" for c in group["template"]["spec"]["containers"])
    # Without a GPU at its start a run takes the cluster for one that has none.
    assert groups["gpu-on-demand"]["minReplicas"] >= 1
    assert groups["gpu-spot"]["minReplicas"] == 0


@pytest.mark.parametrize("name", CUSTOM)
def test_only_spot_workers_may_go_to_spot_nodes(name):
    found = pods(name)
    spot = found.pop("gpu-spot")["spec"]
    taints = {toleration["key"] for toleration in spot["tolerations"]}
    terms = spot["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert len(terms) >= 3
    assert {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority", "nvidia.com/gpu"} <= taints
    for pod in found.values():
        assert {toleration["key"] for toleration in pod["spec"].get("tolerations", [])} <= {"nvidia.com/gpu"}


def test_the_label_is_rays():
    assert MARKET_TYPE == RAY_NODE_MARKET_TYPE_KEY


@pytest.mark.parametrize("name", CUSTOM)
def test_pods_tell_ray_whether_they_may_be_taken_away(name):
    """A driver refuses to run where the label says spot."""
    found = {part: pod["metadata"]["labels"][MARKET_TYPE] for part, pod in pods(name).items()}
    assert found == {"head": "on-demand", "gpu-on-demand": "on-demand", "gpu-spot": "spot"}
    for pod in pods(name).values():
        for container in pod["spec"]["containers"]:
            (variable,) = [v for v in container["env"] if v["name"] == NODE_MARKET_TYPE_ENV]
            assert variable["valueFrom"]["fieldRef"]["fieldPath"] == f"metadata.labels['{MARKET_TYPE}']"


@pytest.mark.parametrize("name", CUSTOM)
def test_the_token_and_secrets_are_references(name):
    assert cluster_spec(name)["authOptions"] == {"mode": "token", "secretName": "ray-ensemble-token"}
    variables = [v for pod in pods(name).values() for c in pod["spec"]["containers"] for v in c["env"]]
    assert variables
    for variable in variables:
        assert not re.search(r"TOKEN$|KEY$|SECRET|PASSWORD", variable["name"]), variable
    for pod in pods(name).values():
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert volumes["hugging-face"]["secret"]["optional"] is True
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in pod["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)


def test_volumes_labels_and_policies_meet():
    claim = MANIFESTS["storage.yaml"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    chosen = MANIFESTS["network.yaml"]["spec"]["podSelector"]["matchLabels"]
    for name in CUSTOM:
        for pod in pods(name).values():
            assert chosen.items() <= pod["metadata"]["labels"].items()
            claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["spec"]["volumes"] if v["name"] == "runs"]
            assert claims == [claim["metadata"]["name"]]


# Ray's cluster launcher ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLOUDS)
def test_launcher_files_pass_rays_own_checks(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / name).read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**config, "max_worker": 1}))


@pytest.mark.parametrize("name", CLOUDS)
def test_clouds_have_the_same_shape(name):
    config = yaml.safe_load((CLUSTER / name).read_text())
    types = config["available_node_types"]
    assert config["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0, "GPU": 0}
    assert types["gpu_on_demand"]["min_workers"] >= 1
    assert types["gpu_spot"]["min_workers"] == 0
    assert types["gpu_spot"]["max_workers"] + types["gpu_on_demand"]["max_workers"] == config["max_workers"]
    assert config["idle_timeout_minutes"] > 0
    spot = {kind for kind, facts in types.items() if re.search(r"\bspot\b", json.dumps(facts["node_config"]), re.I)}
    assert spot == {"gpu_spot"}
    labels = {kind: facts["labels"] for kind, facts in types.items()}
    assert labels == {kind: {MARKET_TYPE: "spot" if kind in spot else "on-demand"} for kind in types}


@pytest.mark.parametrize("name", CLOUDS)
def test_clouds_start_ray_with_a_token_and_on_loopback(name):
    config = yaml.safe_load((CLUSTER / name).read_text())
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = next(command for command in config[key] if "ray start" in command)
        assert 'RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/.ray/auth_token"' in start
    head = next(command for command in config["head_start_ray_commands"] if "ray start" in command)
    assert "--dashboard-host=127.0.0.1" in head
    assert "--autoscaling-config=" in head


@pytest.mark.parametrize("name", CLOUDS)
def test_every_shell_command_parses(name):
    config = yaml.safe_load((CLUSTER / name).read_text())
    commands = [command for key, value in config.items() if key.endswith("commands") for command in value]
    assert len(commands) >= 7
    for command in commands:
        checked = subprocess.run(["sh", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, (command, checked.stderr)


# The image ------------------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """The Containerfile's instructions and arguments, with continued lines joined."""
    text = re.sub(r"\\\n", " ", (CLUSTER / "Containerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def test_the_image_copies_what_exists_and_runs_what_parses():
    copies = [shlex.split(rest) for word, rest in instructions() if word == "COPY"]
    copied = [name for parts in copies for name in parts[:-1] if not name.startswith("--")]
    assert copied
    assert [name for name in copied if not (REPOSITORY / name).exists()] == []
    project = (REPOSITORY / "pyproject.toml").read_text()
    needed = {"pyproject.toml", "ray_ensemble", *re.findall(r'readme = "(.+)"|license-files = \["(.+)"\]', project)[0]}
    assert needed - {""} <= set(copied)
    runs = [rest for word, rest in instructions() if word == "RUN"]
    assert runs
    for command in runs:
        checked = subprocess.run(["sh", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, (command, checked.stderr)
    for snippet in re.findall(r'python -c "([^"]+)"', " ".join(runs)):
        compile(snippet, "Containerfile", "exec")


def test_versions_are_those_of_the_constraints():
    """Ray of the image, of the manifests and of the constraints; the image's tag is this package's version."""
    ray = pinned()["ray"]
    base = next(rest for word, rest in instructions() if word == "FROM")
    assert re.fullmatch(rf"docker\.io/rayproject/ray:{re.escape(ray)}-py3\d+-gpu", base)
    assert f"ray.__version__ == '{ray}'" in (CLUSTER / "Containerfile").read_text()
    for name in CUSTOM:
        assert cluster_spec(name)["rayVersion"] == ray
        images = {c["image"] for pod in pods(name).values() for c in pod["spec"]["containers"]}
        assert images == {f"ghcr.io/your-organisation/ray-ensemble:{__version__}"}
    for name in CLOUDS:
        image = yaml.safe_load((CLUSTER / name).read_text())["docker"]["image"]
        assert image == f"ghcr.io/your-organisation/ray-ensemble:{__version__}"


@pytest.mark.slow
def test_the_image_s_install_works_in_an_environment(tmp_path):
    """The Containerfile's COPY and pip lines, without dependencies, in a fresh environment."""
    home = tmp_path / "home"
    for word, rest in instructions():
        if word == "COPY":
            *sources, target = [part for part in shlex.split(rest) if not part.startswith("--")]
            place = Path(target.replace("/home/ray", str(home)))
            place.mkdir(parents=True, exist_ok=True)
            for source in sources:
                if (REPOSITORY / source).is_dir():
                    shutil.copytree(REPOSITORY / source, place, dirs_exist_ok=True)
                else:
                    shutil.copy(REPOSITORY / source, place)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    install = next(rest for word, rest in instructions() if word == "RUN" and "pip install" in rest)
    python = tmp_path / "venv" / "bin" / "python"
    install = install.replace("/home/ray", str(home)).replace(
        "python -m pip install", f"{python} -m pip install --no-deps", 1
    )
    subprocess.run(["sh", "-c", install], check=True, cwd=tmp_path)
    shown = subprocess.run(
        [python.with_name("ray-ensemble"), "--version"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert shown.stdout.strip() == f"ray-ensemble {__version__}"


# What the README says ---------------------------------------------------------------------------------------------------------


def test_the_job_of_the_readme_is_one_that_grows():
    job = load_config(CLUSTER / "job.yaml")
    assert job.gradients.replicas.max > 1
    assert job.training.concurrency > 1
    assert job.training.gpus == 1
    assert job.model.quantization != "auto"


def test_the_readme_s_commands_and_files_exist(capsys):
    """Every file that it names is there, and every `ray-ensemble` command of it has options that exist."""
    text = (CLUSTER / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    for block in blocks:
        checked = subprocess.run(["sh", "-n"], input=block, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr
    named = set(re.findall(r"\b(?:cluster/)?(?:kuberay/)?[a-z]+\.yaml\b|cluster/Containerfile", " ".join(blocks)))
    assert {"cluster/kuberay/raycluster.yaml", "cluster/aws.yaml", "cluster/Containerfile"} <= named
    for name in named:
        assert (REPOSITORY / name).is_file() or (CLUSTER / name).is_file() or name == "job.yaml", name
    options = set(re.findall(r"(?<=\s)--[a-z]+", " ".join(re.findall(r"ray-ensemble submit .*", " ".join(blocks)))))
    with pytest.raises(SystemExit):
        main(["submit", "--help"])
    shown = capsys.readouterr().out
    assert {"--address", "--output"} <= options
    assert [option for option in options if option not in shown] == []
    for value in ("your-organisation", "storageClassName", "project_id", "AMI", "EFS", "Filestore"):
        assert value in text


def test_no_secret_stands_in_a_file():
    for file in CLUSTER.rglob("*.yaml"):
        for path, value in walk(yaml.safe_load(file.read_text())):
            assert not re.search(r"hf_[A-Za-z0-9]{10}|AKIA[A-Z0-9]{12}|[0-9a-f]{32}", str(value)), (file, path)
