"""The files of docs/cluster.md: their form, and that they name stages, commands and volumes that are there."""

import re
import subprocess

import pytest
import yaml

from lib.pipeline.profile import compose_profile
from lib.utils.files import ROOT

PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
RESOURCES = [
    resource for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) for resource in yaml.safe_load_all(block)
]


def job():
    return next(resource for resource in RESOURCES if resource["kind"] == "Job")


def test_the_kubernetes_job_is_consistent():
    """Its volume is the claim's, and its pods are the seeds of the profile."""
    claim = next(resource for resource in RESOURCES if resource["kind"] == "PersistentVolumeClaim")
    spec, pod = job()["spec"], job()["spec"]["template"]["spec"]
    [container], [volume] = pod["containers"], pod["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": container["workingDir"]}]
    [script] = container["args"]
    assert container["command"] == ["sh", "-c"]
    stage, profile, first = re.search(r"repro -s (\w+)@(\w+)-\$\(\((\d+) \+ JOB_COMPLETION_INDEX\)\)$", script).groups()
    assert spec["completionMode"] == "Indexed"
    seeds = [int(first) + index for index in range(spec["completions"])]
    assert seeds == compose_profile(profile)["seeds"][f"{stage}_seeds"]


def test_the_scripts_are_shell():
    scripts = [
        *re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL),
        *job()["spec"]["template"]["spec"]["containers"][0]["args"],
    ]
    assert len(scripts) >= 5
    for script in scripts:
        done = subprocess.run(["sh", "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", script


def test_the_resources_are_those_of_kubernetes():
    """By the schema that the package carries, unknown keys refused."""
    validator = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate, which carries the schema")
    assert [resource["kind"] for resource in RESOURCES] == ["PersistentVolumeClaim", "Job"]
    for resource in RESOURCES:
        validator.validate(resource, validator.latest_version(), strict=True)
