"""Operators of the students in ONNX's own. Needs onnxscript; `cab_hf.export.onnx.export_onnx` imports it.

Shape legend: `b` batch, `t` token, `d` width, `n` state.
"""

from onnxscript import FLOAT, graph, script
from onnxscript import opset18 as op


@script()
def selective_scan(
    u: FLOAT, dt: FLOAT, A: FLOAT, B: FLOAT, C: FLOAT, state: FLOAT, keep=None
) -> tuple[FLOAT, FLOAT, FLOAT]:
    """`cab_hf.models.s6_scan.chunked_scan` of sequences that are not packed (`keep` is None), one token at a time."""

    @graph()
    def step(h, u_t, dt_t, B_t, C_t):
        decay = op.Exp(op.Mul(op.Unsqueeze(dt_t, op.Constant(value_ints=[1])), A))
        wide_u = op.Unsqueeze(u_t, op.Constant(value_ints=[1]))
        wide_B = op.Unsqueeze(B_t, op.Constant(value_ints=[2]))
        h_t = op.Add(op.Mul(h, decay), op.Mul(wide_u, wide_B))  # (b, n, d)
        read = op.Mul(h_t, op.Unsqueeze(C_t, op.Constant(value_ints=[2])))
        y_t = op.ReduceSum(read, op.Constant(value_ints=[1]), keepdims=0)
        return h_t, y_t

    final, y = op.Scan(
        state, u, dt, B, C, body=step, num_scan_inputs=4, scan_input_axes=[1, 1, 1, 1], scan_output_axes=[1]
    )
    unused = op.Identity(final)  # the chunks' incoming states, which only a backward pass reads
    return y, final, unused
