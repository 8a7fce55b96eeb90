"""The Triton kernels compiled for devices that need not be at hand: machine code within what a pass can afford.

What `test_kernels.py` shows of their results, this shows of their cost, from the code that a device would run: no
register is spilt, aligned rows are read and written 16 bytes at a time, nothing is fp64, and few enough instructions
go to an element for the memory to be what bounds a pass.
"""

import importlib.util
import inspect
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from smoothing.core import agreement
from smoothing.kernels import head_kernels, head_ops, triton_kernels, triton_ops
from tests.support.cases import in_rotation

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
THREADS = 128  # four warps, Triton's default
POINTERS = dict.fromkeys(("targets", "headers", "rows", "labels", "items"), "*i64") | {"header_floats": "*fp64"}
POINTERS |= {"positions": "*i32", "found": "*i32", "hidden": "*bf16"}
FP32 = "priors stats bases scales weights divisor factor kept seen losses partials mean_row loss fine share sums"
POINTERS |= dict.fromkeys([*FP32.split(), "products"], "*fp32")
FLOATS = {"uniform", "cap", "label_share", "prior_share", "smoothing", "z_loss", "mean_scale", "number"}
# An H100 has 132 units that issue 128 instructions in each of 1.7e9 cycles a second. At 3e12 bytes a second that
# makes 19 for an element of bf16 that is read, and 38 for one that is read and written.
ALLOWED = {"statistics_kernel": 19, "gradient_kernel": 38}


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for; `aligned`: sizes and strides that 16 divides, as Triton looks at them."""

    logits: str = "bf16"
    out: str = "bf16"
    capped: bool = False
    smoothed: bool = True
    uniform: bool = True
    field: bool = True
    aligned: bool = True
    capability: int = 90


VARIANTS = {
    "sm_90": Variant(),
    "sm_80": Variant(capability=80),
    "sm_100": Variant(capability=100),
    "fp16": Variant("fp16", "fp16"),
    "fused": Variant("fp32", "bf16", smoothed=False, field=False),
    "fused, sm_80": Variant("fp32", "bf16", smoothed=False, field=False, capability=80),
    "fused, sm_100": Variant("fp32", "bf16", smoothed=False, field=False, capability=100),
    "prior": Variant(uniform=False),
    "softcap": Variant(capped=True),
    "unaligned": Variant(aligned=False),
}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def variant(request) -> Variant:
    return request.param


def compiled(kernel, variant: Variant, **more):
    constants = {
        "CAPPED": variant.capped,
        "SMOOTHED": variant.smoothed,
        "UNIFORM": variant.uniform,
        "WITH_FIELD": variant.field,
        "WITH_STATES": not variant.field,
        "WITH_STATS": True,
        "DIVIDED": variant.smoothed,
        "NARROWED": variant.logits == "fp32" and variant.out != "fp32",
        "BLOCK": triton_ops.COMBINE_BLOCK if kernel is triton_kernels.combine_kernel else triton_ops.BLOCK,
        "BLOCK_H": triton_ops.HIDDEN_BLOCK,
        "PIECE": triton_ops.PIECE,
        "HEADER": agreement.HEADER_FIELDS,
        "START": agreement.OFFSET["start"],
        "MASS": agreement.OFFSET["prior_mass"],
        "column_stride": 1,
        "out_column_stride": 1,
    } | more
    types = POINTERS | dict.fromkeys(FLOATS, "fp32") | {"logits": f"*{variant.logits}", "out": f"*{variant.out}"}
    types |= {"gradient": types["out"], "second": types["out"]} | dict.fromkeys(("states", "scaled", "tile"), "*bf16")
    names = list(inspect.signature(kernel.fn).parameters)
    constants = {name: value for name, value in constants.items() if name in names}
    types = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    unspecialised = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    by_16 = [
        place
        for place, name in enumerate(names)
        if types[name].startswith("*") or (types[name] == "i32" and variant.aligned and name not in unspecialised)
    ]
    source = ASTSource(kernel, types, constants, {(place,): [["tt.divisibility", 16]] for place in by_16})
    target = GPUTarget("cuda", variant.capability, 32)
    return triton.compile(source, target=target, options=triton_ops.COMPILER_OPTIONS)


def instructions(cubin: bytes, folder: Path) -> list[tuple[int, str]]:
    """Address and text of each instruction of the machine code."""
    (folder / "kernel.cubin").write_bytes(cubin)
    command = [TOOLS / "cuobjdump", "-sass", folder / "kernel.cubin"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [(int(at, 16), words) for at, words in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", text)]


def longest_loop(code: list[tuple[int, str]]) -> int:
    """Instructions between the farthest jump back and where it goes; all of them if there is no loop."""
    jumps = [(at, re.search(r"\bBRA\b.*0x([0-9a-f]+)", words)) for at, words in code]
    back = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
    first, last = max(back, key=lambda span: span[1] - span[0], default=(0, code[-1][0]))
    return sum(first <= at <= last for at, _ in code)


@pytest.mark.parametrize("name", ALLOWED)
def test_machine_code(variant, name, tmp_path):
    binary = compiled(getattr(triton_kernels, name), variant)
    ptx, code = binary.asm["ptx"], instructions(binary.asm["cubin"], tmp_path)
    assert not any(re.match(r"(@\S+ )?(LDL|STL)\b", words) for _, words in code), "registers are spilt"
    assert ".f64" not in ptx
    assert "ex2.approx.f32" not in ptx and "ex2.approx.ftz.f32" in ptx
    moved = set(re.findall(r"(?:ld|st)\.global[\w.]*", ptx))
    assert ("ld.global.v4.b32" in moved) == variant.aligned, moved
    if name == "gradient_kernel":
        assert ("st.global.v4.b32" in moved) == variant.aligned, moved
        # where it may write what other threads have still to read, they wait for one another in between
        order = "".join(
            {"ld": "r", "ba": "|", "st": "w"}[what[:2]]
            for what in re.findall(r"ld\.global\.v4|bar\.sync|st\.global", ptx)
        )
        assert ("|" in order) == (variant.logits != variant.out)
        assert ("rw" in order) == (variant.aligned and variant.logits == variant.out), order
    if not variant.capped:  # a tanh is more than a pass can hide
        assert longest_loop(code) <= ALLOWED[name] * triton_ops.BLOCK // THREADS


@pytest.mark.parametrize("ranks", [1, 8])
def test_what_adds_statistics_up(ranks, tmp_path):
    binary = compiled(triton_kernels.combine_kernel, Variant(), RANKS=ranks)
    code = instructions(binary.asm["cubin"], tmp_path)
    assert not any(re.match(r"(@\S+ )?(LDL|STL)\b", words) for _, words in code), "registers are spilt"
    assert (".f64" in binary.asm["ptx"]) == (ranks > 1)  # the masses of the ranks' shards travel so


ALL, NONE = (dict.fromkeys(("SELECTED", "WEIGHTED", "SUMMED", "ROUNDED"), given) for given in (True, False))
HEAD_KERNELS = [
    ("labelled_kernel", {"BLOCK": head_ops.LABELLED_BLOCK}),
    ("gather_kernel", {"ITEMS": "tensor"} | ALL),
    ("gather_kernel", {"ITEMS": "number"} | NONE),
    ("prior_rows_kernel", {"BLOCK_T": head_ops.PARTIALS, "BLOCK": head_ops.BLOCK_H}),
    ("hidden_gradient_kernel", ALL),
    ("hidden_gradient_kernel", NONE),
]


@pytest.mark.parametrize(("kernel", "capability"), in_rotation(HEAD_KERNELS, [90, 80, 90, 100]))
def test_what_is_around_the_products(kernel, capability, tmp_path):
    name, constants = kernel
    blocks = {"BLOCK_T": head_ops.BLOCK_T, "BLOCK_H": head_ops.BLOCK_H}
    binary = compiled(getattr(head_kernels, name), Variant(capability=capability), **blocks | constants)
    code = instructions(binary.asm["cubin"], tmp_path)
    assert not any(re.match(r"(@\S+ )?(LDL|STL)\b", words) for _, words in code), "registers are spilt"
    assert ".f64" not in binary.asm["ptx"]
    moved = set(re.findall(r"(?:ld|st)\.global[\w.]*", binary.asm["ptx"]))
    assert name == "labelled_kernel" or "ld.global.v4.b32" in moved, moved


@pytest.mark.parametrize("items", ["tensor", "number", "count"])
def test_what_adds_the_losses_up(items, tmp_path):
    more = {"ITEMS": items, "EXPECTED": True, "FOUND": True, "BLOCK": triton_ops.SUM_BLOCK}
    code = instructions(compiled(triton_kernels.sum_kernel, Variant(), **more).asm["cubin"], tmp_path)
    assert not any(re.match(r"(@\S+ )?(LDL|STL)\b", words) for _, words in code), "registers are spilt"


def test_what_scales_a_gradient(tmp_path):
    binary = compiled(triton_kernels.scale_kernel, Variant())
    assert {"ld.global.v4.b32", "st.global.v4.b32"} <= set(re.findall(r"(?:ld|st)\.global[\w.]*", binary.asm["ptx"]))
    code = instructions(binary.asm["cubin"], tmp_path)
    assert not any(re.match(r"(@\S+ )?(LDL|STL)\b", words) for _, words in code), "registers are spilt"
