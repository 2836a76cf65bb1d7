"""What the test suite holds its tests to is really held."""

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

CASES = {
    "keeps_to_the_rules": "assert True",
    "leaves_a_file_open": "import builtins; builtins.kept = open(__file__)",
    "leaves_a_thread": """
    import threading, builtins
    builtins.go = threading.Event()
    threading.Thread(target=builtins.go.wait, name="forgotten", daemon=True).start()
""",
    "leaves_shared_memory": 'import os; open(os.environ["STOKER_SHM_DIR"] + "/forgotten", "w").close()',
    "is_skipped": 'import pytest; pytest.skip("too slow")',
    "is_skipped_with_a_line": 'import pytest; pytest.skip("no accelerator")',
}


def test_leaks_and_skips_fail_the_run(tmp_path: Path) -> None:
    conftest = (HERE / "conftest.py").read_text().replace("timeout=10", "timeout=0.1")
    (tmp_path / "conftest.py").write_text(conftest)
    shutil.copy(HERE / "skips.txt", tmp_path)
    with open(tmp_path / "skips.txt", "a") as skips:
        skips.write("test_cases.py::test_it_is_skipped_with_a_line: needs an accelerator\n")
    body = "".join(f"def test_it_{name}():\n    {code.strip()}\n" for name, code in CASES.items())
    (tmp_path / "test_cases.py").write_text(body)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        "-q",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "4 passed, 2 skipped, 3 errors" in done.stdout, done.stdout + done.stderr
    for what in ("open files", "threads ['forgotten']", "shared memory"):
        assert f"left behind: {what}" in done.stdout
    assert "skipped without a line in tests/skips.txt" in done.stdout
    assert "test_it_is_skipped: " in done.stdout and "test_it_is_skipped_with_a_line: " not in done.stdout

    only = [*command, "-k", "test_it_is_skipped"]
    assert subprocess.run(only, cwd=tmp_path, capture_output=True, check=False).returncode == 1
