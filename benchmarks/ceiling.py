"""The machine's own limits: the fastest matrix products and the fastest copy that the installed engines reach here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

from pocketsam.benchmarks.work import Work
from pocketsam.errors import UnknownName, UsageError, WorkerError

TIMEOUT_S = 120
# Read by the BLAS and OpenMP libraries when they are loaded, never later.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
# fp16 artifacts are computed in fp32 by every CPU engine here, unless another precision is asked of OpenVINO.
PRECISIONS = ("fp32", "fp16", "int8", "bf16", "f16")


@dataclass(frozen=True)
class Ceiling:
    """Rates that this machine reaches with a number of threads.

    Attributes:
        gemm_fp32: FLOP/s of the best fp32 matrix product.
        gemm_int8: operations/s of the best u8 x s8 matrix product; None without an engine that has one.
        gemm_bf16, gemm_f16: FLOP/s of matrix products in these; None where OpenVINO or the processor lacks them.
        bandwidth: byte/s of a copy far larger than the cache, bytes read and bytes written both counted.
        threads: CPU threads.
    """

    gemm_fp32: float
    gemm_int8: float | None
    bandwidth: float
    threads: int
    gemm_bf16: float | None = None
    gemm_f16: float | None = None

    def rate(self, precision: str) -> float | None:
        """Operations/s for what is computed in a precision; None where it was not measured.

        Raises:
            UnknownName: no such precision.
        """
        if precision not in PRECISIONS:
            raise UnknownName("precision", precision, PRECISIONS)
        return {"int8": self.gemm_int8, "bf16": self.gemm_bf16, "f16": self.gemm_f16}.get(precision, self.gemm_fp32)


def ceiling(threads: int) -> Ceiling:
    """Measure this machine: about two seconds of work in a process of its own, so that no thread stays behind.

    Other programs that run meanwhile make the result too low: measure on a quiet machine.

    Raises:
        UsageError: ``threads`` below 1.
        WorkerError: the measuring process failed.
    """
    if threads < 1:
        raise UsageError(f"threads is {threads}; expected at least 1.")
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
    command = [sys.executable, "-m", "pocketsam.benchmarks.rates", str(threads)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False,
                              timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as e:
        raise WorkerError(f"measuring the machine took longer than {TIMEOUT_S} s; try again when it is less "
                          "busy.") from e
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise WorkerError(f"measuring the machine failed ({last[:200]}); `pocketsam doctor` shows what is installed.")
    rates = json.loads(done.stdout.splitlines()[-1])
    return Ceiling(**rates, threads=threads)


def floor_ms(work: Work, ceiling: Ceiling, precision: str) -> float:
    """Milliseconds that the work takes at the machine's limits: by computing or by memory, whichever is longer.

    An engine can fall below it where it multiplies less than the definition says (Winograd convolutions) or keeps
    activations in the cache that are counted as memory here.

    Args:
        precision: ``fp32`` and ``fp16`` are held against the fp32 rate, the others against their own.

    Raises:
        UnknownName: another precision.
        UsageError: its rate was not measured.
    """
    rate = ceiling.rate(precision)
    if rate is None:
        needed = "onnx and onnxruntime" if precision == "int8" else "openvino and a processor that computes in it"
        raise UsageError(f"the {precision} rate of this machine was not measured; it needs {needed}: run "
                         "`pip install 'pocketsam[export]'`.")
    return 1e3 * max(work.flops / rate, work.bytes / ceiling.bandwidth)
