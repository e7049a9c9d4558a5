"""HERSR: as trained, deployed, and deployed in channels-last, at its tiny size.

python -m benchmarks.hersr
"""

from claritycore.nets import HERSR, HERSRConfig
from claritycore.nets.hersr import SIZES

from .runner import main
from .span_plksr import net_benchmark

BENCHMARKS = [
    net_benchmark("hersr", lambda case: HERSR(HERSRConfig(**SIZES["hersr-tiny"], scale=case["scale"])), 1e-4),
]

if __name__ == "__main__":
    raise SystemExit(main(*BENCHMARKS))
