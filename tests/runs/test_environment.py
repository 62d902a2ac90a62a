import importlib.metadata
import json
import subprocess
import sys

import torch

from dpoctl.runs.environment import describe_environment, installed_version

CANARY = "hf_" + "canary" * 6


def test_it_names_versions_and_machine_and_is_json(monkeypatch):
    about = json.loads(json.dumps(describe_environment(world_size=2)))
    assert about["packages"]["torch"] == importlib.metadata.version("torch")
    assert about["world_size"] == 2
    assert len(about["devices"]) == max(1, torch.cuda.device_count())


def test_no_environment_variable_and_no_secret_gets_into_it(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setattr(sys, "argv", ["dpoctl", "dpo", "r.yaml", "--set", f"token={CANARY}", CANARY])
    text = json.dumps(describe_environment())
    assert "canary" not in text
    assert "r.yaml" in text


def test_a_machine_without_git_has_no_commit(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert describe_environment()["git_sha"] is None


def test_a_package_that_is_not_there_has_no_version():
    assert installed_version("no-such-package-at-all") is None
