"""`study accumulation`: how many bits a tensor core keeps of a sum, and what fewer or more cost."""

from dataclasses import dataclass

from experiments.study.accumulator import relative_error
from experiments.study.machine import H800, Machine, step_seconds, token_seconds
from experiments.study.show import Output, Section, present

# Speed of FP8 products without promotion over that with it at 4096 x 4096 x 7168 on an H200: the
# vendor's with one scale over ours, TFLOP/s of bench_gemm_h200.json.
WITHOUT_PROMOTION = 1514 / 1306
# Operands of so many elements take 2 GB.
MOST_ELEMENTS = 2**22
# Promotion is needed where sums are worse than what 13 bits and promotion every 128 give.
INTERVALS = (None, 512, 256, 128)


@dataclass(frozen=True)
class AccumulationArgs(Output):
    """Fraction bits of the FP8 accumulator: error of a sum of 4096, and the training step.

    Errors are those of the bit-level model, on operands of mean zero and on positive ones. Where
    the bits alone are as good as promotion on the H800, promotion can be left out, and FP8 products
    are as fast as without it.
    """

    bits: tuple[int, ...] = tuple(range(10, 25))
    """Fraction bits; the H800 keeps 13."""
    elements: int = 4096
    """Length of the contraction."""


def study_accumulation(args: AccumulationArgs) -> None:
    """The command `study accumulation`."""
    args.check()
    if any(not 1 <= bits <= 40 for bits in args.bits) or not args.bits:
        raise ValueError(f"--bits {args.bits} must be from 1 to 40")
    if not 128 <= args.elements <= MOST_ELEMENTS or args.elements % 128:
        raise ValueError(
            f"--elements {args.elements} must be a multiple of 128, at most {MOST_ELEMENTS}"
        )
    present([errors(args.bits, args.elements), intervals(args.elements)], args)


def errors(bits: tuple[int, ...], elements: int) -> Section:
    """Over the bits: errors, whether promotion can go, and what that saves."""
    right = relative_error("positive", promote=128, num_elements=elements)
    base = step_seconds(H800)
    rows = []
    for b in bits:
        alone = {
            kind: relative_error(kind, fraction_bits=b, num_elements=elements)
            for kind in ("zero-mean", "positive")
        }
        promoted = relative_error("positive", fraction_bits=b, promote=128, num_elements=elements)
        free = alone["positive"] <= right
        machine = Machine(fp8=WITHOUT_PROMOTION if free else 1.0)
        rows.append({
            "fraction bits": b,
            "error, zero-mean": alone["zero-mean"],
            "error, positive": alone["positive"],
            "positive, promoted every 128": promoted,
            "promotion": "not needed" if free else "needed",
            "training step s": step_seconds(machine),
            "step %": 100 * (step_seconds(machine) / base - 1),
            "TPOT ms": 1e3 * token_seconds(machine),
        })  # fmt: skip
    names = ("error, zero-mean", "error, positive", "positive, promoted every 128")
    return Section(f"Error of a sum of {elements} products", rows, "fraction bits", names, True)


def intervals(elements: int) -> Section:
    """Over the interval of promotion, with the H800's 13 bits."""
    rows = []
    for promote in INTERVALS:
        rows.append({
            "promotion": "never" if promote is None else f"every {promote}",
            **{
                f"error, {kind}": relative_error(kind, promote=promote, num_elements=elements)
                for kind in ("zero-mean", "positive")
            },
        })  # fmt: skip
    names = ("error, zero-mean", "error, positive")
    return Section("13 bits, by the interval of promotion", rows, "promotion", names, True)
