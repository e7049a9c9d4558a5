"""RSFMoENet, HERSR and HARMONIC with its fast path at their tiny sizes: as trained, deployed, and channels last.

They have no peer: no other program has these nets. RSFMoENet goes to all four experts here, since at near ties rounding
would decide on the choice, and differently in each form.

python -m benchmarks.hybrid_nets
"""

from claritycore.nets import HARMONIC, HERSR, HARMONICConfig, HERSRConfig, RSFMoEConfig, RSFMoENet
from claritycore.nets.harmonic import SIZES as HARMONIC_SIZES
from claritycore.nets.hersr import SIZES as HERSR_SIZES
from claritycore.nets.rsfmoe import SIZES as RSFMOE_SIZES

from .runner import Case, main
from .span_plksr import net_benchmark


def rsfmoe(case: Case) -> RSFMoENet:
    return RSFMoENet(RSFMoEConfig(scale=case["scale"], k=4, **RSFMOE_SIZES["rsfmoe-tiny"]))


def hersr(case: Case) -> HERSR:
    return HERSR(HERSRConfig(scale=case["scale"], **HERSR_SIZES["hersr-tiny"]))


def harmonic(case: Case, *, fast_path: bool = False) -> HARMONIC:
    return HARMONIC(HARMONICConfig(scale=case["scale"], fast_path=fast_path, **HARMONIC_SIZES["harmonic-tiny"]))


BENCHMARKS = [
    net_benchmark("rsfmoe", rsfmoe, 1e-4),
    net_benchmark("hersr", hersr, 1e-4),
    net_benchmark("harmonic", harmonic, 1e-4),
    net_benchmark("harmonic_fast_path", lambda case: harmonic(case, fast_path=True), 1e-4),
]

if __name__ == "__main__":
    raise SystemExit(main(*BENCHMARKS))
