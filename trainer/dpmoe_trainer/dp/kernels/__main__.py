"""Compiles the kernels beside their sources, for an image whose containers have no compiler."""

from dpmoe_trainer.dp.kernels.build import SOURCES, build, levels

for level in levels():
    print(build(SOURCES, level=level))
