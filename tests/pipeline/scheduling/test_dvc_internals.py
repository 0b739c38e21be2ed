"""Every private part of DVC that dvc_internals uses exists and has the signature that it expects."""

import ast
import inspect
import os
import re

import dvc
import pytest
from dvc import exceptions
from dvc.dvcfile import PROJECT_FILE, ProjectFile
from dvc.repo import Repo, lock_repo, reproduce
from dvc.rwlock import RWLOCK_FILE
from dvc.stage import PipelineStage
from dvc.stage.cache import StageCache
from ruamel.yaml import YAML

from pipeline.scheduling import dvc_internals
from tests.helpers.study import ROOT

CALLS = {
    "repo.lock_repo": (lock_repo, ("repo",), {}),
    "repo.Repo": (Repo, (), {"_wait_for_lock": True}),
    "reproduce.get_active_graph": (reproduce.get_active_graph, ("graph",), {}),
    "reproduce.plan_repro": (reproduce.plan_repro, ("graph", "stages"), {}),
    "reproduce._reproduce": (reproduce._reproduce, ("stages",), {"graph": None, "repro_fn": None}),
    "stage.changed": (PipelineStage.changed, ("self", False, "upstream"), {}),
    "stage.changed_stage": (PipelineStage.changed_stage, ("self",), {}),
    "stage.changed_deps": (PipelineStage.changed_deps, ("self",), {}),
    "stage.outs_cached": (PipelineStage.outs_cached, ("self",), {}),
    "stage.save_deps": (PipelineStage.save_deps, ("self",), {}),
    "stage.save": (PipelineStage.save, ("self",), {}),
    "stage.commit": (PipelineStage.commit, ("self",), {}),
    "stage.reproduce": (PipelineStage.reproduce, ("self",), {"upstream": []}),
    "stage_cache._load": (StageCache._load, ("self", "stage"), {}),
    "stage_cache._create_stage": (StageCache._create_stage, ("self", "entry"), {"wdir": "."}),
    "dvcfile.dump_stages": (ProjectFile.dump_stages, ("self", "stages"), {"update_pipeline": False}),
}
"""Name -> (function, positional arguments, keyword arguments), as dvc_internals calls it."""


@pytest.mark.parametrize("name", CALLS)
def test_a_private_function_takes_the_arguments_that_we_pass(name):
    function, arguments, options = CALLS[name]
    inspect.signature(function).bind(*arguments, **options)


def test_a_stage_and_a_repository_have_the_attributes_that_we_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "dvc.yaml").open("w") as file:
        YAML().dump({"stages": {"a": {"cmd": "true", "deps": ["x"], "params": ["n"]}}}, file)
    (tmp_path / "x").touch()
    (tmp_path / "params.yaml").write_text("n: 1\n")
    Repo.init(no_scm=True).close()
    with Repo() as repo, repo.lock:
        assert repo.index.graph is not None
        assert callable(repo.scm_context)
        assert isinstance(repo.stage_cache, StageCache)
        (stage,) = repo.index.stages
        assert isinstance(stage, PipelineStage)
        assert isinstance(stage.dvcfile, ProjectFile)
        assert (stage.addressing, stage.path_in_repo, stage.cmd, stage.frozen) == ("a", PROJECT_FILE, "true", False)
        assert stage.wdir == str(tmp_path)
        stage.save_deps()
        assert {str(dep): bool(dep.hash_info.value) for dep in stage.deps} == {"x": True, "params.yaml": True}
        assert str(tmp_path / dvc_internals.RWLOCK) == f"{repo.tmp_dir}/{RWLOCK_FILE}"


def test_a_user_without_a_name_and_home_can_use_dvc(tmp_path, monkeypatch):
    pwd = pytest.importorskip("pwd", reason="Windows has no table of users")

    def find_no_user(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.chdir(tmp_path)
    Repo.init(no_scm=True).close()
    for name in ("USER", "LOGNAME", "LNAME", "USERNAME", "HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "x")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", find_no_user)
    dvc_internals.name_user()
    with Repo() as repo:
        assert repo.site_cache_dir
    assert os.environ["HOME"] == str(tmp_path / ".dvc" / "tmp")
    monkeypatch.delenv("USER")
    with pytest.raises(KeyError, match="uid not found"), Repo() as repo:
        assert not repo.site_cache_dir


def test_without_git_one_line_has_the_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    Repo.init(no_scm=True).close()
    (tmp_path / ".dvc" / "config").write_text("")
    remedy = r"is not a git repository\. Fix: run `git init`, or `dvc config core\.no_scm true`"
    with pytest.raises(ValueError, match=remedy), dvc_internals.readable_dvc_errors():
        Repo()


def test_a_user_with_a_name_and_home_keeps_them(monkeypatch):
    monkeypatch.setenv("USER", "me")
    monkeypatch.setenv("HOME", "/home/me")
    dvc_internals.name_user()
    assert (os.environ["USER"], os.environ["HOME"]) == ("me", "/home/me")


def test_errors_have_the_classes_that_we_catch():
    assert issubclass(exceptions.PrettyDvcException, exceptions.DvcException)
    assert issubclass(exceptions.ReproductionError, exceptions.DvcException)


def test_the_installed_dvc_is_within_the_bound():
    (bound,) = re.findall(r'"dvc>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    (locked,) = re.findall(r"^dvc==([\d.]+)$", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
    low, high, tested, installed = (tuple(map(int, version.split(".")[:2])) for version in (*bound, locked, dvc.__version__))
    assert low <= tested < high == (tested[0], tested[1] + 1)
    assert low <= installed < high


def test_only_one_module_uses_dvc():
    users = set()
    for path in (*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "cat").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.partition(".")[0] == "dvc" for name in names):
                users.add(path.relative_to(ROOT).as_posix())
    assert users == {"pipeline/scheduling/dvc_internals.py"}
