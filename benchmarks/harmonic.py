"""The smallest HARMONIC with windows, and its fast path of convolutions: trained, deployed, and channels last.

It has no peer: no other program has this net. How much the fast path saves is the ratio of the two tables.

python -m benchmarks.harmonic
"""

from torch import nn

from claritycore.nets import HARMONIC, HARMONICConfig
from claritycore.nets.harmonic import SIZES

from .runner import Case, main
from .span_plksr import net_benchmark


def build(case: Case, *, fast_path: bool) -> nn.Module:
    return HARMONIC(HARMONICConfig(scale=case["scale"], fast_path=fast_path, **SIZES["harmonic-tiny"]))


BENCHMARKS = [
    net_benchmark("harmonic", lambda case: build(case, fast_path=False), 1e-4),
    net_benchmark("harmonic_fast_path", lambda case: build(case, fast_path=True), 1e-4),
]

if __name__ == "__main__":
    raise SystemExit(main(*BENCHMARKS))
