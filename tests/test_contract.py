"""config.modality: folders of the package, modules of the user, and messages for neither."""

import os
import subprocess
import sys

import conftest
import pytest

from data2vec_jax.core.errors import UserError
from data2vec_jax.modalities import contract

OWN = "from data2vec_jax.modalities.vision.modality import MODALITY\n"


@pytest.fixture
def lab(tmp_path, monkeypatch):
    folder = tmp_path / "some_lab"
    (folder / "folder").mkdir(parents=True)
    (folder / "eeg.py").write_text(OWN)
    (folder / "folder/modality.py").write_text(OWN)
    (folder / "empty.py").write_text("MODALITY = 'eeg'\n")
    (folder / "broken.py").write_text("import not_installed_anywhere\n")
    (folder / "renamed.py").write_text("from data2vec_jax.core.errors import no_such_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("some_lab")]:
        del sys.modules[name]


def test_folders_of_the_package_are_found():
    assert {"speech", "text", "vision"} <= set(contract.names())
    for name in contract.names():
        assert contract.get(name).name == name


@pytest.mark.parametrize("name", ["some_lab.eeg", "some_lab.folder", "some_lab.folder.modality"])
def test_a_module_of_the_user_is_found(lab, name):
    assert contract.get(name) is contract.get("vision")


@pytest.mark.parametrize(
    "name, says",
    [
        ("visoin", "no modality 'visoin'; did you mean 'vision'"),
        ("two words", "no modality 'two words'; choose from"),
        ("", "no modality ''; choose from"),
        ("no_lab.eeg", "cannot import 'no_lab.eeg', there is no module no_lab in .* PYTHONPATH"),
        ("some_lab.ecg", r"there is no module some_lab\.ecg in"),
        ("some_lab.broken", "it needs the module not_installed_anywhere"),
        ("some_lab.renamed", "cannot import 'some_lab.renamed': cannot import name 'no_such_name'"),
        ("some_lab.empty", "module some_lab.empty has no MODALITY"),
        ("some_lab", "module some_lab has no MODALITY"),
    ],
)
def test_what_cannot_be_found_is_one_line(lab, name, says):
    with pytest.raises(UserError, match=f"config.modality: .*{says}") as error:
        contract.get(name)
    assert "\n" not in str(error.value)


def test_a_console_script_searches_the_current_folder(lab):
    script = lab / "data2vec-train"
    script.write_text(
        "import sys\nfrom data2vec_jax.cli.scripts import train\n"
        "if __name__ == '__main__':\n    sys.exit(train())\n"
    )
    options = [f"--workdir={lab}/w", "--config=vision_v2:smoke"]
    env = {**os.environ, "PYTHONPATH": str(conftest.ROOT)}

    def run(*more):
        command = [sys.executable, "-P", script, *options, *more]
        return subprocess.run(command, cwd=lab, env=env, capture_output=True, text=True)

    found = run("--config.modality=some_lab.empty")
    assert found.returncode == 2
    assert "some_lab.empty has no MODALITY" in found.stderr  # it was imported
    assert "python -m data2vec_jax.train" in run("--help").stdout
