"""The flow of ``python -m bench.gpu.check`` without a GPU: rehearsed on the CPU where nothing else is installed, with
parts that fail, hang and are killed, and with builds that are none."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import build, check, check_report, part

BLOCKED = ("torch_rechub", "pytest", "fbgemm_gpu", "torchrec", "deepctr_torch", "fuxictr")


@pytest.fixture
def bare(tmp_path):
    """The environment of a python in which little more than torch can be imported and nothing is compiled."""
    code = f"""\
        import sys

        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {BLOCKED}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, Block())
    """
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(textwrap.dedent(code))
    return {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "TORCHDYNAMO_DISABLE": "1"}


def command(*arguments: str | Path) -> list:
    return [sys.executable, "-m", "bench.gpu.check", *arguments]


@pytest.fixture
def checkout(tmp_path):
    """The sources alone: nobody has built a library there."""
    for name in ("bench", "rankkernels"):
        shutil.copytree(
            check.ROOT / name, tmp_path / "checkout" / name, ignore=shutil.ignore_patterns("*.so", "records", "__pyc*")
        )
    return tmp_path / "checkout"


def run(environment: dict, place: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), cwd=place, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(bare):
    done = run(bare, check.ROOT, "--out", "never")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ["gpu_check: no GPU: torch.cuda.is_available() is False"]


def test_arguments(capsys):
    arguments = check.parse(["--out", "here", "--part", "capture", "--part", "steps"])
    assert arguments.out == Path("here") and arguments.part == ["capture", "steps"] and not arguments.rehearse
    with pytest.raises(SystemExit):
        check.parse(["--part", "nothing"])
    assert "invalid choice" in capsys.readouterr().err
    assert set(check.PARTS) == set(part.PARTS)


def test_the_whole_is_less_than_seven_minutes():
    stages = list(check.stages(check.PARTS))
    assert sum(check.PARTS[names[0]].seconds for names in stages) <= check.LIMIT < 7 * 60 - 10
    assert [names for names in stages if len(names) > 1] == [["correctness", "models", "capture"]]
    unbuilt = [name for name, p in check.PARTS.items() if not p.built]
    assert unbuilt == list(check.PARTS)[:3] and list(check.PARTS)[-1] == "compile"


@pytest.mark.parametrize("parts", [["embeddings"], pytest.param([], marks=pytest.mark.slow, id="all")])
def test_rehearsal_where_nothing_is_installed(bare, checkout, tmp_path, parts):
    done = run(bare, checkout, "--rehearse", "--out", tmp_path / "out", *(f"--part={name}" for name in parts))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    records = check_report.read(tmp_path / "out/gpu_check.jsonl")
    ran = {r["part"] for r in records if r["kind"] == "part"}
    assert ran == set(parts or check.PARTS) and not any(r.get("error") for r in records)
    raced = [r for r in records if r["kind"] == "timing" and r["part"] == "embeddings"]
    assert [(r["case"], r["pass"]) for r in raced] == [(item.name, item.kind) for item in part.timed.EMBEDDINGS]
    assert all(r["seconds"]["ours"] > 0 for r in raced)
    if "models" in ran:
        assert {"exact Adam, embedding_bag", "exact Adam, embedding_fm, launches"} <= {r.get("what") for r in records}
    page = (tmp_path / "out/gpu_check.md").read_text()
    assert page in done.stdout and "Nothing is wrong." in page and " s in all." in page
    row = next(
        line for line in page.splitlines() if line.startswith("| embeddings | 26 tables x 100k x 16, B65536 | for")
    )
    assert "(83–120)" in row and "(240)" in row
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["gpu_check.jsonl", "gpu_check.md"]


def test_a_killed_run_leaves_what_it_had(bare, tmp_path):
    log = tmp_path / "gpu_check.jsonl"
    started = subprocess.Popen(
        command("--rehearse", "--out", tmp_path, "--part=embeddings"), cwd=check.ROOT, env=bare, start_new_session=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while not (log.exists() and '"timing"' in log.read_text()) and started.poll() is None:
        time.sleep(0.02)
    started.kill()
    started.wait()
    with log.open("a") as file:
        file.write('{"kind": "timing", "part": "st')  # a line that was being written
    page = check_report.markdown(check_report.read(log))
    assert "The run was not finished." in page and "| embeddings | 26 tables x 100k x 16, B65536 | forward |" in page


#: In the place of a part: what its name says.
FAKE = """
import json, sys, time
name, log = sys.argv[1], sys.argv[2].removeprefix("--log=")
with open(log, "a") as file:
    record = {"kind": "finding", "part": name, "what": "x", "ok": True, "detail": " ".join(sys.argv[4:])}
    file.write(json.dumps(record) + "\\n")
if name == "steps":
    raise RuntimeError("an illegal memory access was encountered")
if name == "embeddings":
    time.sleep(60)
"""


@pytest.fixture
def checking(tmp_path, monkeypatch):
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(check, "PART", (sys.executable, str(tmp_path / "fake.py")))
    monkeypatch.setattr(check, "GRACE", 0.5)
    return check.Check(tmp_path, rehearse=False, limit=100)


def outcome(folder: Path) -> dict[str, str]:
    return {r["part"]: r["error"] for r in check_report.read(folder / "gpu_check.jsonl") if r["kind"] == "part"}


def test_a_part_that_fails_or_hangs_costs_no_other(checking, tmp_path):
    parts = {name: check.Part(1) for name in ("steps", "embeddings", "others")}
    checking.run(parts | {"capture": check.Part(1, alone=False, processes=2)})
    assert outcome(tmp_path) == {
        "steps": "exit status 1: RuntimeError: an illegal memory access was encountered",
        "embeddings": "ended, because its time was over",
        "others": "",
        "capture": "",
    }
    records = check_report.read(tmp_path / "gpu_check.jsonl")
    shards = sorted(r["detail"] for r in records if r["kind"] == "finding" and r["part"] == "capture")
    assert shards == ["--shard 0 2", "--shard 1 2"]
    assert [f.split(":")[0] for f in check_report.failures(records)] == ["steps", "embeddings"]
    assert (tmp_path / "steps.stderr").exists() and not (tmp_path / "others.stderr").exists()


def test_nothing_begins_when_the_time_is_over(checking, tmp_path):
    checking.end = time.monotonic() + 0.4
    checking.run({"others": check.Part(5)})
    assert outcome(tmp_path) == {"others": "not begun: the run's time is over"}


# The build.


def fake_build(monkeypatch, tmp_path, code: str) -> build.Build:
    monkeypatch.setattr(build, "COMMAND", (sys.executable, "-c", textwrap.dedent(code)))
    return build.Build(tmp_path / "build", (9, 0), "/toolkit")


def test_the_build_is_for_one_architecture_in_a_folder_of_its_own(monkeypatch, tmp_path):
    code = """
        import json, os, sys
        names = "RANKKERNELS_CUDA", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"
        print(json.dumps([os.getcwd(), sys.argv[1:], *(os.environ[name] for name in names)]))
    """
    built = fake_build(monkeypatch, tmp_path, code)
    assert built.wait(60) == ""
    place, arguments, *environment = json.loads(built.log.read_text())
    assert place == str(check.ROOT) and environment[:3] == ["1", "/toolkit", "9.0"] and int(environment[3]) >= 1
    folder = tmp_path / "build"
    assert arguments == ["build_ext", f"--build-temp={folder / 'temp'}", "build", f"--build-lib={folder / 'lib'}"]
    assert built.library == folder / "lib"


def test_a_build_that_fails_or_lasts_says_so(monkeypatch, tmp_path):
    failed = fake_build(monkeypatch, tmp_path, "print('x.cu(3): error: no'); print('ninja stopped'); exit(1)")
    assert failed.wait(60) == "exit status 1: x.cu(3): error: no"
    slow = fake_build(monkeypatch, tmp_path, "import time; time.sleep(60)")
    assert slow.wait(0.1) == "not done in 0 s"
    slow.kill()
    assert slow.process.returncode == -signal.SIGKILL


def test_parts_run_on_the_library_that_was_built_and_on_the_checkout_if_none_was(monkeypatch, checking, tmp_path):
    with_library = {"others": check.Part(1), "attention": check.Part(1)}
    begun = []
    process = check.Process

    def recorded(name, seconds, out, library, options):
        begun.append((name, library))
        return process(name, seconds, out, None, options)

    monkeypatch.setattr(check, "Process", recorded)
    for code, library in (("", tmp_path / "build/lib"), ("exit(3)", None)):
        checking.build = fake_build(monkeypatch, tmp_path, code)
        checking.library = None
        checking.run(with_library)
        assert begun == [("others", library), ("attention", library)]
        assert bool(outcome(tmp_path)["build"]) == (library is None)
        begun.clear()


def test_a_module_is_imported_from_the_library_and_bench_from_the_checkout(tmp_path):
    package = tmp_path / "lib/rankkernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the built one')")
    process = check.Process("others", 5, tmp_path, tmp_path / "lib", [])
    assert process.finish(60) == "exit status 1: RuntimeError: the built one"


def test_the_toolkit_is_found_behind_a_link_or_a_script(monkeypatch, tmp_path):
    toolkit = tmp_path / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    nvcc = toolkit / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={toolkit}/bin/..' >&2\n")
    nvcc.chmod(0o755)
    (tmp_path / "path").mkdir()
    (tmp_path / "path/nvcc").write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    (tmp_path / "path/nvcc").chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:{os.path.dirname(shutil.which('sh'))}")
    assert build.cuda_home() == str(toolkit)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.cuda_home() is None
    monkeypatch.setenv("CUDA_HOME", "/given")
    assert build.cuda_home() == "/given"


# The page.

DEVICE = {
    "kind": "device", "part": "all", "name": "Card", "target": "CUDA 13.0, sm_90", "memory_gib": 80.0,
    "multiprocessors": 132, "torch": "2.13", "triton": "3.7.1", "rankkernels": "0.1",
}  # fmt: skip


def timing(part: str, seconds: dict, host: dict, case: str = "FM B8192 F39 D16") -> dict:
    return {
        "kind": "timing", "part": part, "case": case, "pass": "forward + backward", "dtype": "float32",
        "seconds": seconds, "host": host, "no graph": ["eager"], "raised": {}, "bytes": 27e6, "flops": 4e8,
    }  # fmt: skip


def test_report():
    records = [
        DEVICE,
        {"kind": "ceilings", "part": "all", "copy": 3e12, "float32": 4e14, "float16": 8e14, "bfloat16": 8e14},
        timing("interactions", {"ours": 1e-5, "eager": 3e-5}, {"ours": 5e-5, "eager": 2e-5}),
        timing("interactions", {"ours": 1e-5}, {"ours": 1e-6}, case="y"),
        timing("compile", {"ours": 2e-5, "compile": 1.5e-5}, {"ours": 4e-5, "compile": 2e-6}),
        {"kind": "finding", "part": "correctness", "what": "a", "ok": True, "detail": ""},
        {"kind": "finding", "part": "capture", "what": "b", "ok": None, "detail": "no kernel"},
        {"kind": "finding", "part": "capture", "what": "c", "ok": None, "detail": "no kernel"},
        {"kind": "reference", "part": "models", "op": "embedding_bag", "why": "built without it"},
        {"kind": "part", "part": "capture", "error": "", "seconds": 12.2},
        {"kind": "part", "part": "compile", "error": check_report.LATE, "seconds": 60},
        {"kind": "end", "part": "all", "seconds": 12.5},
    ]
    page = check_report.markdown(json.loads(json.dumps(records)))
    for line in (
        "Card (CUDA 13.0, sm_90), 80.0 GiB, 132 multiprocessors; torch 2.13, triton 3.7.1, rankkernels 0.1",
        "Nothing is wrong.",
        "| correctness | 1 | 0 | 0 |",
        "| capture | 0 | 0 | 2 |",
        "- capture: no kernel (2: b, ..)",
        "- compile: ended, because its time was over (1: what is not in the table)",
        "- embedding_bag: built without it",
        "| interactions | FM B8192 F39 D16 | forward + backward | float32 | 10.0, host 40 (90) "
        "| 30.0*, host 20 (54–70) |  | 15.0, host 2 (40–60) | 90 % | 10.0 % |",
        "| interactions | y | forward + backward | float32 | 10.0 |  |  |  | 90 % | 10.0 % |",
        "12.5 s in all. capture 12 s, compile 60 s",
    ):
        assert line in page.splitlines(), line
    records.append({"kind": "finding", "part": "models", "what": "DIN", "ok": False, "detail": "error 1"})
    records.append({"kind": "part", "part": "steps", "error": "exit status 1: x", "seconds": 1})
    assert check_report.failures(records) == ["models: DIN: error 1", "steps: exit status 1: x"]
    assert "**2 wrong:**" in check_report.markdown(records)


def test_a_page_of_nothing():
    assert "No device was recorded." in check_report.markdown([])
