"""The promise: the C++ kernels give the same bits whatever the width of the vectors, so that all widths are right."""

import os
import subprocess
import sys

import pytest

from convnorm.backends import why_not

PROGRAM = """
import sys
import numpy as np, torch, convnorm
sys.path.insert(0, {tests!r})
import cases
rng = np.random.default_rng({seed})
for i in range(400):
    case = cases.random_large_case(rng) if i % 20 == 0 else cases.random_case(rng)
    dtype = cases.DTYPES[i % len(cases.DTYPES)]
    weight = torch.from_numpy(rng.standard_normal(case.weight_shape)).to(dtype)
    if i % 3 == 0 and weight.dim() == 4:
        weight = weight.to(memory_format=torch.channels_last)
    l1, linf, winners = torch.ops.convnorm.measure_native([weight], case.plan)
    print(l1.item().hex(), linf.item().hex(), winners.tolist())
"""


@pytest.mark.skipif(bool(why_not("native", "cpu")), reason="the extension is not built")
def test_vectors_of_every_width_give_the_same_bits(seed):
    program = PROGRAM.format(tests=os.path.dirname(__file__), seed=seed)
    results = {}
    for width in (16, 32, 64):
        environment = os.environ | {"CONVNORM_VECTOR_BYTES": str(width)}
        command = [sys.executable, "-c", program]
        results[width] = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert results[16].count("\n") == 400
    assert results[16] == results[32] == results[64]
