"""The Dockerfile agrees with what it packs, and with who the pods run as."""

import re

import pytest
from tests.chart.helm import ROOT

from dpmoe_operator.control.settings import Settings

DOCKERFILE = (ROOT / "Dockerfile").read_text()
IGNORE = (ROOT / ".dockerignore").read_text().splitlines()


def stage(name: str) -> str:
    """The text of one stage."""
    [text] = [s for s in re.split(r"^(?=FROM )", DOCKERFILE, flags=re.M) if f" AS {name}\n" in s]
    return text


def copied() -> list[str]:
    """What is copied from the checkout."""
    lines = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, flags=re.M)
    return [path for line in lines for path in line.split()]


def test_everything_that_is_copied_is_there_and_sent_to_the_builder() -> None:
    assert len(copied()) == 7
    for path in copied():
        assert (ROOT / path).exists(), path
    assert IGNORE[:2][-1] == "*"
    assert {line[1:] for line in IGNORE if line.startswith("!")} == set(copied())


@pytest.mark.parametrize(("image", "other"), [("operator", "trainer"), ("trainer", "operator")])
def test_each_image_has_its_own_packages_only(image: str, other: str) -> None:
    packages = stage(f"{image}-packages")
    assert f"--constraint constraints.txt '.[{image}]'" in packages
    assert f"COPY --from={image}-packages /opt/dpmoe /opt/dpmoe" in stage(image)
    assert f"{other}-packages" not in stage(image)


def test_both_run_as_the_user_that_the_pods_name() -> None:
    user = Settings(namespace="", trainer_image="").pods_run_as
    assert f"USER {user}:{user}\n" in stage("runtime")
    for image in ("operator", "trainer"):
        assert stage(image).startswith("FROM runtime AS ")
        assert "USER" not in stage(image)


def test_entry_points_are_the_commands_that_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert 'ENTRYPOINT ["dpmoe"]\nCMD ["operator"]' in stage("operator")
    assert "\ndpmoe = " in project
    assert 'ENTRYPOINT ["python", "-m", "dpmoe_trainer"]' in stage("trainer")
    assert (ROOT / "trainer" / "dpmoe_trainer" / "__main__.py").exists()
