"""The package itself: what a wheel holds, what importing costs, whether the examples run."""

import ast
import doctest
import importlib
import json
import os
import pathlib
import pkgutil
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest

import keras_coatnet

pytestmark = pytest.mark.tensorflow_only

ROOT = pathlib.Path(__file__).parents[1]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(keras_coatnet.__path__, "keras_coatnet.")
    if not module.name.endswith("__main__")
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("build")
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(folder / "source")],
        check=True,
        capture_output=True,
    )
    wheel, sdist = (next((folder / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    return wheel, sdist


@pytest.mark.slow
def test_wheel_and_sdist_hold_what_they_need(built):
    wheel, sdist = built
    inside = zipfile.ZipFile(wheel).namelist()
    for name in (
        "keras_coatnet/__init__.py",
        "keras_coatnet/cli/__init__.py",
        "keras_coatnet_command.py",
        "keras_coatnet/layers/attention.py",
        "keras_coatnet/weights/checkpoints.json",
        "keras_coatnet/classes/imagenet1k.txt",
        "keras_coatnet/classes/imagenet12k.txt",
        "keras_coatnet/py.typed",
    ):
        assert name in inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert not any(name.startswith(("tests", "examples", "build")) for name in inside)
    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    assert {"LICENSE", "README.md", "setup.cfg", "examples/quickstart.py"} <= names


@pytest.mark.slow
def test_wheel_installs_and_works_by_itself(built, tmp_path):
    """Installed into an empty folder, away from the sources."""
    wheel, _ = built
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*install, "--target", str(tmp_path), str(wheel)], check=True)
    code = (
        "import sys, keras_coatnet as k; print(k.__file__); print(len(k.checkpoints())); "
        "print(k.decode_predictions(__import__('numpy').eye(1000)[:1], 1)[0][0][1])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    path, checkpoints, name = result.stdout.split()
    assert pathlib.Path(path).is_relative_to(tmp_path)
    assert (checkpoints, name) == ("18", "tench")
    # The command starts with its own `keras_coatnet_command`, and reads the registry beside it.
    listed = subprocess.run(
        [sys.executable, str(tmp_path / "bin" / "keras-coatnet"), "models", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(json.loads(listed.stdout)) == 18


@pytest.mark.slow
def test_importing_loads_nothing_that_keras_does_not():
    """What importing costs beyond Keras, in modules rather than in noisy seconds."""
    code = (
        "import sys, keras; before = set(sys.modules); import keras_coatnet; "
        "print(*{m.partition('.')[0] for m in set(sys.modules) - before})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert set(result.stdout.split()) <= {"keras_coatnet", *sys.stdlib_module_names}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["keras_coatnet", *MODULES])
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    seen = {"keras_coatnet": keras_coatnet, **vars(module)}
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(module, extraglobs=seen):
        # The largest would fill this machine; their example differs from CoAtNet0's in the number.
        if not re.search(r"CoAtNet[3-7]$", test.name):
            runner.run(test)
    assert runner.failures == 0


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_documented(name):
    module = importlib.import_module(name)
    for key, value in vars(module).items():
        if key.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        assert getattr(value, "__doc__", None), f"{name}.{key} has no docstring"


def test_no_private_imports():
    for path in (ROOT / "keras_coatnet").rglob("*.py"):
        assert not re.search(r"keras\.src|tensorflow\.python", path.read_text()), path


def _house() -> dict[str, set[str]]:
    """The table of CONTRIBUTING.md: each room, and the rooms that it imports."""
    rows = re.findall(r"^\| (`.*`) \| .* \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    house = {}
    for rooms, below in rows:
        for room in re.findall(r"`(.+?)`", rooms):
            house[room] = set(re.findall(r"`(.+?)`", below))
    return house


def _imported(path: pathlib.Path) -> set[str]:
    """Paths of the package's modules that a file imports, wherever in it: `"layers/base"`."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {name if name in MODULES else node.module for name in names}
    ours = [module.split(".") for module in modules if module.split(".")[0] == "keras_coatnet"]
    return {"/".join(parts[1:]) or "__init__" for parts in ours}


def test_scripts_import_names_that_exist():
    """Also inside functions, which a script may not reach for minutes, and from each other."""
    for script in [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py")]:
        for node in ast.walk(ast.parse(script.read_text("utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            names = [alias.name for alias in node.names]
            beside = script.with_name(f"{node.module}.py")
            if beside.is_file():
                found = ast.parse(beside.read_text("utf-8")).body
                known = {getattr(each, "name", None) for each in found}
                inside = (node for each in found for node in ast.walk(each))
                stored = (node for node in inside if isinstance(node, ast.Name))
                known |= {node.id for node in stored if isinstance(node.ctx, ast.Store)}
                missing = set(names) - known
            elif node.module.partition(".")[0] == "keras_coatnet":
                module = importlib.import_module(node.module)
                missing = {
                    name
                    for name in names
                    if not hasattr(module, name) and f"{node.module}.{name}" not in MODULES
                }
            else:
                continue
            assert not missing, f"{script.name}: {node.module} has no {', '.join(missing)}"


def test_the_house_is_as_contributing_says():
    """Every arrow between rooms stands in the table, is used, and runs downwards."""
    house = _house()

    def room_of(path: str) -> str:
        found = [
            room
            for room in house
            if f"{path}/".startswith(f"{room.removesuffix('.py')}/".replace("//", "/"))
        ]
        return max(found, key=len)

    used = {room: set() for room in house}
    for path in (ROOT / "keras_coatnet").rglob("*.py"):
        room = room_of(path.relative_to(ROOT / "keras_coatnet").with_suffix("").as_posix())
        used[room] |= {room_of(module) for module in _imported(path)} - {room}
    assert used == house
    order = list(house)
    assert [(a, b) for a in house for b in house[a] if order.index(b) < order.index(a)] == []
