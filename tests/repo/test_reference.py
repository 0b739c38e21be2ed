"""The API reference has every module and every exported name with its docstring; warnings are errors."""

import pkgutil
import re
import subprocess
import sys
from importlib.util import find_spec

import cat
from tests.helpers.study import ROOT


def reference(folder, packages, before=""):
    """Write the reference in a new interpreter, because this changes modules."""
    script = f"{before}\nfrom pathlib import Path\nfrom docs.reference import write\nwrite(Path({str(folder)!r}), {packages!r})"
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)


def docstrings(page):
    """Name -> its docstring on the page, as HTML."""
    sections = re.findall(r'<section id="([\w.]+)">(.*?)</section>', page, flags=re.DOTALL)
    return {
        name: "".join(re.findall(r'<div class="docstring">(.*?)</div>', text, flags=re.DOTALL)[:1]) for name, text in sections
    }


def test_the_reference_has_every_module_and_describes_every_exported_name(tmp_path):
    done = reference(tmp_path / "api", ("cat",))
    assert (done.returncode, done.stderr) == (0, "")
    modules = {module.name: module.ispkg for module in pkgutil.walk_packages(cat.__path__, "cat.")}
    del modules["cat.hf"]
    if not find_spec("triton"):
        del modules["cat.ops.conv.triton_backend"]
    assert {"cat.layer", "cat.mixers.base", "cat.tasks.recall"} <= modules.keys()
    for module, is_package in {"cat": False, **modules}.items():
        page = (tmp_path / "api" / f"{module.replace('.', '/')}.html").read_text(encoding="utf-8")
        has_docstring = re.search(r'<section class="module-info">.*?<div class="docstring"><p>', page, flags=re.DOTALL)
        assert has_docstring or is_package, module
        assert not re.search("PydanticUndefined|FieldInfo|Alias for field|Initialize internal", page), module
    package = (tmp_path / "api" / "cat.html").read_text(encoding="utf-8")
    described = docstrings(package)
    assert {name for name in cat.__all__ if not described.get(name)} == set()
    assert 'href="cat/layer.html"' in package
    layer = (tmp_path / "api" / "cat" / "layer.html").read_text(encoding="utf-8")
    assert "jaxtyping.Float[Tensor, 'B L D']" in re.sub(r"<[^>]+>", "", layer).replace("&#39;", "'")
    taylor = docstrings((tmp_path / "api" / "cat" / "mixers" / "based" / "op.html").read_text(encoding="utf-8"))
    assert "&lt;phi(x), phi(y)" in taylor["features"]


def test_a_warning_of_pdoc_is_an_error_and_leaves_no_files(tmp_path):
    spoil = "import cat.seeding\ncat.seeding.generator.__annotations__['seed'] = 'Absent'"
    done = reference(tmp_path / "api", ("cat.seeding",), before=spoil)
    assert done.returncode == 1
    assert "Error parsing type annotation Absent for cat.seeding" in done.stderr
    assert list(tmp_path.iterdir()) == []
