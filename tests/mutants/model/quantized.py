"""Mistakes in `model/quantized.py`: {function: [(what went wrong, source, source with the mistake)]}."""

SCALE = "scale = (weight.abs().amax(dim=1) / INT8_MAX)"

CHANGES = {
    "pack_int8": [
        ("one scale for all rows", SCALE, SCALE.replace("amax(dim=1)", "amax().expand(len(weight))")),
        ("scale of the columns", SCALE, SCALE.replace("amax(dim=1)", "amax(dim=0).amax().expand(len(weight))")),
        ("signs of the largest", SCALE, SCALE.replace("weight.abs()", "weight")),
        ("cut off, not rounded", ".round_()", ".trunc_()"),
        ("one code too many", "INT8_MAX = 127", "INT8_MAX = 128"),
        ("half the codes", "INT8_MAX = 127", "INT8_MAX = 63"),
        ("scale in float32", ").to(weight.dtype)\n", ").float()\n"),
    ],
    "pack_nf4": [
        ("mean not taken off", "state.absmax - mean", "state.absmax"),
        ("mean forgotten", '"scale_mean": mean', '"scale_mean": torch.zeros_like(mean)'),
        ("blocks of columns", "weight.contiguous(), blocksize", "weight.T.contiguous(), blocksize"),
        ("other codes", 'blocksize=NF4_BLOCK, quant_type="nf4")', 'blocksize=NF4_BLOCK, quant_type="fp4")'),
        ("scales of scales forgotten", '"scale_of_scale": scales.absmax', '"scale_of_scale": scales.absmax * 0'),
    ],
    "QuantizedLinear": [
        ("first row's scale", "self.scale[:, None]", "self.scale[:1, None]"),
        ("Conv1D left transposed", "else weight.T.contiguous()", "else weight"),
        ("bias lost", "nn.Parameter(bias.detach(), ", "nn.Parameter(torch.zeros_like(bias), "),
        ("bias trained", "bias.detach(), requires_grad=False", "bias.detach()"),
        ("mean of scales forgotten", "offset=self.scale_mean", "offset=0 * self.scale_mean"),
    ],
    "UnpackedProduct": [
        ("no bias", ", linear.bias)", ")"),
        ("sign of the gradient", "return grad @", "return -grad @"),
        ("x kept", "ctx.linear = linear", "ctx.linear = linear\n        ctx.save_for_backward(x)"),
        ("weight kept", "ctx.linear = linear", "ctx.linear = linear\n        ctx.save_for_backward(linear.weight)"),
        ("doubled", "return F.linear(", "return 2 * F.linear("),
    ],
}
