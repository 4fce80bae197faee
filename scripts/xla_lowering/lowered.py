"""One case: the product's step, with a fault if that is asked, lowered by torch-xla, examined and run."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from xla_lowering import hlo
from xla_lowering.cases import CHECKS, Case

Json = dict[str, Any]
_WIDTHS = {"int32": "s32", "int64": "s64", "float32": "f32", "bfloat16": "bf16"}


def nothing() -> Json:
    """Return the result of a case of which nothing is known yet."""
    problems: dict[str, list[str]] = {name: [] for name in CHECKS}
    return {"ops": {}, "waived": [], "int64_inside": [], "error": None, "versions": {}, "problems": problems}


def run_case(case: Case) -> Json:
    """Lower, check and run one case."""
    import torch
    import torch_xla
    import torch_xla.debug.metrics

    from nanogpt_buckets.errors import GateFailed
    from nanogpt_buckets.model.architecture import Architecture
    from nanogpt_buckets.plan.bucket import Bucket
    from nanogpt_buckets.steps import gate, step_named
    from nanogpt_buckets.steps.separate import Separate

    xla, device = torch_xla._XLAC, torch_xla.device()
    arch, bucket = Architecture(**case.arch), Bucket(case.batch_size, case.seq_len, case.step)
    weights = gate.seeded_weights(arch, getattr(torch, case.dtype), fused=False)
    host, graph = (make_graph(case.fault, arch, bucket, weights) for _ in range(2))
    interface = step_named(case.step).interface(arch, bucket, case.dtype)
    # as the product compiles it: a function of its weights where it keeps state, else they are inside
    separate = Separate(graph, len(interface.inputs)) if interface.state else None
    if separate is None:
        graph.to(device)
    held = {name: weight.to(device) for name, weight in graph.named_parameters()}
    programs = set()
    result = nothing()
    problems = result["problems"]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torch_xla": torch_xla.__version__}
    result["versions"] = versions

    def given(tensors: Any) -> list[torch.Tensor]:
        """Return a call's tensors as the device gets them."""
        ids, *others = tensors
        return [(ids.long() if case.fault == "int64 ids" else ids).to(device), *(x.to(device) for x in others)]

    def called(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Call the step with inputs and state."""
        first = len(interface.inputs)
        made = graph(*tensors) if separate is None else separate(*tensors[:first], *held.values(), *tensors[first:])
        return [*made] if isinstance(made, tuple) else [made]

    def lower() -> None:
        tensors = given((*graph.step.pack([], bucket), *(view.blank() for view in interface.state)))
        torch_xla.sync()
        xla._set_allow_execution(False)
        try:
            outputs = called(tensors)
            context = xla.lowering.LoweringContext("step")
            context.build(outputs)
        finally:
            xla._set_allow_execution(True)
        programs.add(xla._get_graph_hash(outputs))
        computation = xla._xla_op_computation_from_module_proto("step", context.hlo())
        program = hlo.parse(xla._xla_computation_text(computation))
        named = [
            (each.name, tensor) for each, tensor in zip((*interface.inputs, *interface.state), tensors, strict=True)
        ]
        wanted = {each.name: (each.dtype, each.shape) for each in (*interface.inputs, *interface.state)}
        for name, weight in held.items():
            named.append((name, weight))
            wanted[name] = (case.dtype, tuple(weight.shape))
        inputs = {name: (context.tensor_parameter_id(tensor), shape_of(*wanted[name])) for name, tensor in named}
        problems["shapes"] += hlo.dynamic_shapes(program)
        problems["operators"] += sorted(set(hlo.undocumented(program)))
        problems["inputs"] += hlo.unfit_inputs(program, inputs)
        result["ops"] = dict(sorted(Counter(found.opcode for found in program.instructions.values()).items()))
        result["waived"] = sorted(hlo.WAIVED & result["ops"].keys())
        result["int64_inside"] = hlo.int64_inside(program)

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        # torch-xla cannot run under the gate's inference mode
        with torch.inference_mode(False), torch.no_grad():
            outputs = called(given(tensor.clone() for tensor in tensors))
            programs.add(xla._get_graph_hash(outputs))
            problems["indices"] += out_of_range(host, tensors)
            return [output.cpu() for output in outputs]

    with torch.no_grad():
        try:
            lower()
        except RuntimeError as error:
            problems["trace"].append(str(error).strip())
    try:
        result["error"] = gate.check(run, arch, bucket, weights, fused=False)["relative_error_e9"] / 1e9
    except GateFailed as error:
        problems["gate"].append(error.message)
    if len(programs) > 1:
        problems["trace"].append("not one program but several")
    problems["trace"] += (f"{name} ran on the host" for name in torch_xla.debug.metrics.executed_fallback_ops())
    return result


def shape_of(dtype: str, shape: tuple[int, ...]) -> str:
    """Return a tensor's type as HLO writes it."""
    return f"{_WIDTHS[dtype]}[{','.join(map(str, shape))}]"


def out_of_range(host: Any, tensors: Any) -> Iterator[str]:
    """Say so if a call looks up what is not there: XLA takes the nearest instead, and Neuron's runtime ends."""
    if tensors[0].numel() * host.gpt.arch.n_embd > 2**14:  # what is large looks up what is small does
        return
    try:
        host.run(*tensors)
    except IndexError as error:
        yield str(error)


def make_graph(fault: str, arch: Any, bucket: Any, weights: Any) -> Any:
    """Return the product's step in a bucket as it is lowered for Neuron, with the fault."""
    import torch
    from torch import Tensor

    from nanogpt_buckets.backends.neuron.backend import NeuronBackend
    from nanogpt_buckets.model.gpt import Lowering, from_weights
    from nanogpt_buckets.steps import step_named
    from nanogpt_buckets.steps.graph import Graph

    extras: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "sort": lambda ids, last: torch.sort(ids, dim=1).values[:, :1],
        "value read in trace": lambda ids, last: ids[:, : 1 + int(last[0] > 0)].sum(),
        "dynamic shape": lambda ids, last: (ids > 0).nonzero().sum(),
    }

    class Faulty(Graph):
        def forward(self, *tensors: Tensor) -> Any:
            input_ids, last_index = tensors
            if fault == "left padding":
                position = torch.arange(input_ids.shape[1], dtype=torch.int32, device=input_ids.device)  # (S)
                source = position - (input_ids.shape[1] - 1 - last_index).unsqueeze(1)  # (B, S)
                input_ids = torch.where(source < 0, 0, input_ids.gather(1, source.clamp(min=0).long()))
            if fault in ("left padding", "last_index ignored"):
                return self.gpt.head(self.gpt.hidden(input_ids)[:, -1])
            logits = super().forward(input_ids, last_index)
            return logits + 0.0 * extras[fault](input_ids, last_index) if fault in extras else logits

    class FaultyChunk(Graph):
        def forward(self, *tensors: Tensor) -> Any:
            ids, start, last_index, *state = tensors
            if fault == "position not clamped":
                position = start.unsqueeze(1) + torch.arange(ids.shape[1], dtype=torch.int32, device=ids.device)
                gpt = SimpleNamespace(
                    arch=self.gpt.arch,
                    head=self.gpt.head,
                    hidden=lambda ids, at, memory: self.gpt.hidden(ids, position, memory),
                )
                return self.step.forward(gpt, *tensors)
            if fault == "old state ignored":
                state = [torch.zeros_like(tensor) for tensor in state]
            if fault == "k and v exchanged":
                logits, v, k, *made = super().forward(ids, start, last_index, state[1], state[0], *state[2:])
                return (logits, k, v, *made)
            logits, *made = super().forward(ids, start, last_index, *state)
            if fault == "write skipped in one layer":
                made[:2] = state[:2]
            return (logits, *made)

    gpt = from_weights(arch, weights, Lowering(**NeuronBackend.lowering))
    if fault == "list-form split":
        torch.tensor_split = lambda x, n, dim: x.split([x.shape[dim] // n] * n, dim=dim)
    for block in gpt.transformer["h"]:
        attend, scale = block.attn._attend_explicitly, block.attn.scale
        if fault == "mask dropped":
            block.attn._attend_explicitly = lambda q, k, v, seen, s=scale: torch.softmax(q @ k.mT * s, dim=-1) @ v
        elif fault == "mask off by one":
            # a token sees the slot behind its own
            block.attn._attend_explicitly = lambda q, k, v, seen, real=attend: real(
                q, k, v, torch.cat([seen[..., :1] | True, seen[..., :-1]], -1)
            )
    kind = FaultyChunk if bucket.step == "chunk" else Faulty
    return kind(step_named(bucket.step).within(bucket), gpt)
