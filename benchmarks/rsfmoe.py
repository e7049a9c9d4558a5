"""RSFMoENet: as trained, deployed, and deployed in channels-last, at its tiny size.

python -m benchmarks.rsfmoe
"""

from claritycore.nets import RSFMoEConfig, RSFMoENet
from claritycore.nets.rsfmoe import SIZES

from .runner import main
from .span_plksr import net_benchmark

BENCHMARKS = [
    net_benchmark("rsfmoe", lambda case: RSFMoENet(RSFMoEConfig(**SIZES["rsfmoe-tiny"], scale=case["scale"])), 1e-4),
]

if __name__ == "__main__":
    raise SystemExit(main(*BENCHMARKS))
