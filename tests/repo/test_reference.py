"""The API reference: every module, every exported name with what its docstring says, and no warning that is let pass."""

import pkgutil
import re
import subprocess
import sys
from importlib.util import find_spec

import cat
from tests.helpers.study import ROOT


def reference(folder, packages, before=""):
    """The reference written in a fresh interpreter, since pdoc is told about modules by changing them."""
    script = f"{before}\nfrom pathlib import Path\nfrom docs.reference import write\nwrite(Path({str(folder)!r}), {packages!r})"
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)


def docstrings(page):
    """Name -> what the page says of it, as HTML."""
    sections = re.findall(r'<section id="([\w.]+)">(.*?)</section>', page, flags=re.DOTALL)
    return {
        name: "".join(re.findall(r'<div class="docstring">(.*?)</div>', text, flags=re.DOTALL)[:1]) for name, text in sections
    }


def test_the_reference_has_every_module_and_says_what_every_exported_name_is(tmp_path):
    done = reference(tmp_path / "api", ("cat",))
    assert (done.returncode, done.stderr) == (0, "")
    modules = [module.name for module in pkgutil.walk_packages(cat.__path__, "cat.")]
    if not find_spec("triton"):
        modules.remove("cat.ops.conv.triton_backend")
    assert {"cat.layer", "cat.mixers.base", "cat.tasks.recall"} <= set(modules)
    for module in ("cat", *modules):
        page = (tmp_path / "api" / f"{module.replace('.', '/')}.html").read_text(encoding="utf-8")
        assert re.search(r'<section class="module-info">.*?<div class="docstring"><p>', page, flags=re.DOTALL), module
        assert not re.search("PydanticUndefined|FieldInfo|Alias for field|Initialize internal", page), module
    package = (tmp_path / "api" / "cat.html").read_text(encoding="utf-8")
    said = docstrings(package)
    assert {name for name in cat.__all__ if not said.get(name)} == set()
    assert 'href="cat/layer.html"' in package
    layer = (tmp_path / "api" / "cat" / "layer.html").read_text(encoding="utf-8")
    assert "jaxtyping.Float[Tensor, 'B L D']" in re.sub(r"<[^>]+>", "", layer).replace("&#39;", "'")
    taylor = docstrings((tmp_path / "api" / "cat" / "mixers" / "based" / "op.html").read_text(encoding="utf-8"))
    assert "&lt;phi(x), phi(y)" in taylor["features"]


def test_what_pdoc_warns_of_is_an_error_and_leaves_nothing(tmp_path):
    done = reference(
        tmp_path / "api",
        ("cat.tasks.registry",),
        "import cat.tasks.registry as tasks\ntasks.generator.__annotations__['seed'] = 'Absent'",
    )
    assert done.returncode == 1
    assert "Error parsing type annotation Absent for cat.tasks" in done.stderr
    assert list(tmp_path.iterdir()) == []
