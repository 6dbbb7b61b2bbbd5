"""Compiled kernels: where they come from, and what happens where they cannot."""

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dpmoe_trainer.dp import kernels
from dpmoe_trainer.dp.kernels import build


@pytest.fixture(autouse=True)
def _loaded_again() -> Iterator[None]:
    kernels.library.cache_clear()
    yield
    kernels.library.cache_clear()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dpmoe" / "kernels"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


def test_a_library_is_compiled_once_and_then_needs_no_compiler(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build.find_or_build()
    assert built.parent == cache
    assert [file.name for file in cache.iterdir()] == [build.library_name()]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert build.find_or_build() == built
    assert kernels.library() is not None


def test_other_sources_have_another_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = build.library_name()
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-g"))
    assert build.library_name() != name


@pytest.mark.usefixtures("cache", "no_compiler")
def test_without_a_compiler_torch_does_it_and_a_line_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert kernels.library() is None
        assert not kernels.usable(torch.zeros(1))
    assert "no C++ compiler" in caplog.text
    assert len(caplog.records) == 1


def test_a_compiler_that_fails_is_no_compiler(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho cannot find cc1plus >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(broken))
    assert kernels.library() is None
    assert "cannot find cc1plus" in caplog.text
    assert not any(cache.iterdir())


def test_what_is_no_library_is_not_used(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.mkdir(parents=True, mode=0o700)
    (cache / build.library_name()).write_bytes(b"not a library")
    assert kernels.library() is None
    assert "no compiled kernels" in caplog.text


@pytest.mark.parametrize("wrong", ["_KNOWN_NORMS", "_KNOWN_NORMALS"])
def test_kernels_that_miscalculate_are_not_used(
    wrong: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known = {"_KNOWN_NORMS": [14035.0, 73499.0], "_KNOWN_NORMALS": {129: -0.1753473942}}
    monkeypatch.setattr(kernels, wrong, known[wrong])
    assert kernels.library() is None
    assert "miscalculate" in caplog.text


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_code_is_not_loaded_from_where_others_may_write(cache: Path, mode: int) -> None:
    cache.mkdir(parents=True)
    cache.chmod(mode)
    (cache / build.library_name()).write_bytes(b"planted")
    with pytest.raises(build.CannotBuild):
        build.find_or_build()


def test_where_no_cache_can_be_a_temporary_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    built = build.find_or_build()
    assert built.is_file()
    assert os.stat(built.parent).st_mode & 0o077 == 0
    shutil.rmtree(built.parent)


def test_an_image_may_bring_the_library(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in (*build.SOURCES.glob("*.cpp"), *build.SOURCES.glob("*.h")):
        shutil.copy(source, tmp_path)
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    brought = build.build(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert build.find_or_build() == brought
    assert not cache.exists()


@pytest.mark.parametrize(
    ("features", "level"),
    [
        ("fpu sse2", "x86-64"),
        ("cx16 popcnt sse4_1 sse4_2 ssse3", "x86-64-v2"),
        ("avx2 bmi1 bmi2 f16c fma movbe sse4_2", "x86-64-v3"),
    ],
)
def test_levels_run_and_agree(
    features: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels for lesser processors are compiled, and pass their known answers on this one."""
    monkeypatch.setattr(build, "_features", lambda: set(features.split()))
    assert build._level() == level
    assert level in build.levels()
    assert build.library_name() == build.library_name(level)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernels.library() is not None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_samples_of_equal_length_are_segments(dtype: torch.dtype, tolerance: float) -> None:
    a, g = torch.randn(5, 9, 20, dtype=dtype), torch.randn(5, 9, 7, dtype=dtype)
    assert kernels.usable(a, g)
    formed = (g.double().transpose(1, 2) @ a.double()).pow(2).sum((1, 2))
    norms = kernels.squared_norms_of_samples(a, g)
    assert torch.allclose(norms, formed, rtol=tolerance, atol=0)


@pytest.mark.parametrize("left_turned", [False, True])
@pytest.mark.parametrize("right_turned", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (17, 33, 47), (5, 300, 16), (300, 600, 129), (4, 0, 5), (0, 3, 5)]
)
def test_products_are_those_of_torch(
    sizes: tuple[int, int, int], left_turned: bool, right_turned: bool
) -> None:
    """Edges of tiles and slices, empty matrices, and all orders of memory; twice in one call."""
    rows, depth, columns = sizes
    left = torch.randn(depth, rows).T if left_turned else torch.randn(rows, depth)
    right = torch.randn(columns, depth).T if right_turned else torch.randn(depth, columns)
    products = torch.full((2, rows, columns), torch.nan)
    kernels.multiply(list(products), [left, 2 * left], [right, right])
    exact = left.double() @ right.double()
    bound = 1e-6 * (left.double().abs() @ right.double().abs())
    assert ((products[0] - exact).abs() <= bound).all()
    assert torch.equal(products[1], 2 * products[0])


def test_products_do_not_depend_on_the_threads() -> None:
    left, right = torch.randn(300, 700), torch.randn(700, 90)
    products, before = torch.empty(3, 300, 90), torch.get_num_threads()
    try:
        for threads, product in zip((1, 2, 5), products, strict=True):
            torch.set_num_threads(threads)
            kernels.multiply([product], [left], [right])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(products[0], products[1])
    assert torch.equal(products[0], products[2])


def test_products_are_for_single_precision_where_torch_is_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    single, double = torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.float64)
    monkeypatch.setattr(kernels, "is_slow_in_torch", lambda: True)
    assert kernels.multiplies(single, single) == torch.backends.mkl.is_available()
    assert not kernels.multiplies(double, double)
    monkeypatch.setattr(kernels, "is_slow_in_torch", lambda: False)
    assert not kernels.multiplies(single, single)


def test_other_types_and_mixed_ones_are_for_torch() -> None:
    assert not kernels.usable(torch.zeros(1, dtype=torch.bfloat16))
    assert not kernels.usable(torch.zeros(1, device="meta"))
    assert not kernels.usable(torch.zeros(1), torch.zeros(1, dtype=torch.float64))
