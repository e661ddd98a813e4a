"""What holds the package together: floors of imports, what stays free of JAX, small files, declared dependencies."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from floors import FLOORS, JAX_PACKAGES, WITHOUT_JAX, WITHOUT_JAX_UNTIL_ASKED

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ryzanstein_jax"
MAX_LINES = 400

#: The two lines that may leave a test out, and no others.
LIVE_COMPARISON = ("tests/test_live_transformers.py:14", "tests/test_live_transformers.py:15")

#: A client of the server with all that it brings along.
LM_EVAL = ("tests/server/test_lm_eval.py:12", "tests/server/test_lm_eval.py:13")

#: All of them; what proves that Ray's nodes may die: Ray is an extra of 80 MB; and the page in a browser.
LEFT_OUT = (
    *LIVE_COMPARISON, *LM_EVAL, "tests/orchestrator/test_ray_hosts.py:15",
    "tests/server/test_browser.py:15", "tests/server/test_browser.py:17",
)  # fmt: skip

#: Parts of the package that an extra brings the dependencies of.
EXTRAS = {"native": "cpu", "server": "serve", "server.tracing": "otel"}

#: Where what is imported is called otherwise than what is installed.
DISTRIBUTIONS = {
    "huggingface_hub": "huggingface-hub",
    "orbax": "orbax-checkpoint",
    "ml_dtypes": "ml-dtypes",
    "pydantic_core": "pydantic",
    "opentelemetry": "opentelemetry-sdk",
}


def position(name: str) -> tuple[int, int]:
    """Floor of a module and its place there."""
    for floor, names in enumerate(FLOORS):
        if name in names:
            return floor, names.index(name)
    raise LookupError(f"{name or '__init__'} has no floor: declare it in tests/floors.py")


@cache
def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name without the package's; "" is the package itself."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(name: str) -> tuple[set[str], set[str]]:
    """Modules of the package, and top-level names of others, that a module imports: anywhere, also in functions."""
    path = modules()[name]
    own, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = [PACKAGE, *filter(None, name.split("."))]
                keep = len(package) - node.level + (path.name == "__init__.py")
                base = ".".join([*package[:keep], *filter(None, [base])])
            # `from package import module` names a module; `from module import thing` names the module before it.
            inside = [f"{base}.{alias.name}" for alias in node.names]
            targets = [full if full.removeprefix(f"{PACKAGE}.") in modules() else base for full in inside]
        else:
            continue
        for target in targets:
            if target == PACKAGE or target.startswith(f"{PACKAGE}."):
                own.add(target[len(PACKAGE) + 1 :])
            else:
                others.add(target.partition(".")[0])
    return own, others


def reached(name: str) -> set[str]:
    """A module and all that it imports from the package, directly or not; the packages around them too."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        module = waiting.pop()
        if module in seen or module not in modules():
            continue
        seen.add(module)
        waiting += imports(module)[0]
        if "." in module:
            waiting.append(module.rpartition(".")[0])
    return seen


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_from_below_only(name: str) -> None:
    here = position(name)
    wrong = []
    for target in imports(name)[0]:
        assert target in modules(), f"{name} imports {PACKAGE}.{target}, which does not exist"
        if position(target) >= here:
            wrong.append(target)
    assert not wrong, f"{name} (floor {here[0]}) imports from its own height or above: {sorted(wrong)}"


def test_no_floor_names_a_module_twice() -> None:
    names = [name for floor in FLOORS for name in floor]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", [name for name in WITHOUT_JAX if name in modules()])
def test_what_must_outlive_jax_does_not_reach_it(name: str) -> None:
    guilty = {module: found for module in reached(name) if (found := imports(module)[1] & JAX_PACKAGES)}
    # The leader hosts the coordination service, so that it outlives the ranks: that takes jaxlib, and no more.
    assert guilty.pop("orchestrator.coordinator", {"jaxlib"}) == {"jaxlib"}
    assert not guilty, f"{name} reaches JAX through {guilty}"


def test_importing_them_does_not_import_jax() -> None:
    """Libraries may import JAX behind our back, so it is tried as well as read."""
    without = (*WITHOUT_JAX, *WITHOUT_JAX_UNTIL_ASKED)
    names = [PACKAGE, *(f"{PACKAGE}.{name}" for name in without if name in modules())]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[2:]:\n"
        "    importlib.import_module(name)\n"
        "    found = set(sys.argv[1].split(',')) & set(sys.modules)\n"
        "    assert not found, f'importing {name} imports {found}'\n"
    )
    command = [sys.executable, "-c", code, ",".join(JAX_PACKAGES), *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


#: Imported by name at run time, and only if it is there: extras that bring it, for those who can use it.
OPTIONAL = {"nvidia-ml-py": ("cuda12", "cuda13", "test"), "matplotlib": ("bench", "test")}


def test_every_optional_dependency_is_declared() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, places in OPTIONAL.items():
        for extra in places:
            assert any(re.match(rf"{name}\b", requirement) for requirement in extras[extra]), (name, extra)


def test_every_dependency_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def canonical(requirement: str) -> str:
        return re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower().replace("_", "-")

    declared = {canonical(requirement) for requirement in project["dependencies"]}
    # jax brings jaxlib at the version that it needs.
    declared.add("jaxlib")
    extras = {
        extra: {canonical(requirement) for requirement in requirements}
        for extra, requirements in project["optional-dependencies"].items()
    }
    for name in modules():
        needed = [EXTRAS[part] for part in {name.partition(".")[0], name} & EXTRAS.keys()]
        allowed = declared.union(*(extras[extra] for extra in needed))
        used = {canonical(DISTRIBUTIONS.get(one, one)) for one in imports(name)[1] - set(sys.stdlib_module_names)}
        assert used <= allowed, f"{name} imports what pyproject.toml does not declare: {used - allowed}"
    for extra in EXTRAS.values():
        assert extras[extra] <= extras["test"], f"the tests need all of the extra {extra}"


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_says_what_it_is_for(name: str) -> None:
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree), f"{name} has no docstring"


#: What tools leave behind. Folders of results and notebooks are read like the rest.
LEFT_BEHIND = re.compile(r"__pycache__|build|dist|node_modules|.*\.egg-info|\..*")
TEXT = {".py", ".sh", ".md", ".toml", ".cfg", ".ini", ".yml", ".yaml", ".ipynb", ".json", ""}


def text_files(folder: Path = ROOT) -> Iterator[Path]:
    """Every text file that belongs to the repository."""
    for path in sorted(folder.iterdir()):
        if LEFT_BEHIND.fullmatch(path.name) and path.name != ".ci":
            continue
        if path.is_dir() and not (path / "pyvenv.cfg").exists():
            yield from text_files(path)
        elif path.is_file() and path.suffix in TEXT:
            yield path


def lines_with(pattern: re.Pattern[str], suffixes: set[str] = TEXT) -> list[str]:
    """Where a pattern stands in the repository, as file:line."""
    return [
        f"{path.relative_to(ROOT)}:{number}"
        for path in text_files()
        if path.suffix in suffixes and path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]


def test_files_stay_small() -> None:
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in text_files()
        if path.suffix in {".py", ".sh"}
    }
    assert {path: lines for path, lines in sizes.items() if lines > MAX_LINES} == {}
    assert f"{PACKAGE}/plan.py" in sizes and "tests/test_architecture.py" in sizes


def test_no_file_names_a_package_registry() -> None:
    """Registries come from the user's own settings, so that mirrors and closed networks work."""
    assert lines_with(re.compile(r"pypi\.[o]rg|python[h]osted|registry\.npm[j]s|conda\.[a]naconda|crates\.[i]o")) == []


def test_no_file_names_one_machine() -> None:
    assert lines_with(re.compile(r"(?<![\w.$}])/(work|root|home|Users)/\w")) == []


def test_nothing_is_left_open_or_switched_off() -> None:
    # What this test forbids, spelled so that it does not find itself.
    words = r"\b(TOD[O]|FIXM[E]|XX[X])\b|pragma:\s*no cove[r]"
    left = words + r"|\b(pytest|mark|unittest)\.([s]kip(if)?|[x]fail|[i]mportorskip)\b"
    # Only what needs an extra may leave itself out: gigabytes of torch for `hf`, lm-eval, Ray and a browser.
    found = [place for place in lines_with(re.compile(left), {".py", ".sh"}) if place not in LEFT_OUT]
    assert found == []


def test_continuous_integration_runs_the_tests() -> None:
    assert re.search(r"^make test\b", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
