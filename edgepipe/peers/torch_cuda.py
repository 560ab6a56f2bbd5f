"""PyTorch with cuDNN on this machine's GPU: channels last, the whole network as one CUDA graph, in
halves where the bundle computes in them. Networks of the zoo alone: what torch runs is the module.

A measured inference is what a bundle's is: input to the GPU, the graph, outputs back.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from edgepipe import zoo
from edgepipe.errors import UserError
from edgepipe.peers import Case, Engine, Outputs, timed

RUNNERS = ("cuda-local",)
#: Runs before a graph is captured: cuDNN chooses its algorithms in them.
_WARM = 5


def missing() -> str:
    """What is missing of torch, CUDA in it and a GPU."""
    if importlib.util.find_spec("torch") is None:
        return "pip install 'edgepipe[torch]'"
    import torch

    return "" if torch.cuda.is_available() else "install a torch that is built for this GPU's CUDA"


def engines(case: Case) -> list[Engine]:
    """The zoo network that the bundle was compiled from. Raises UserError for any other."""
    import torch

    name = str(case.model or case.bundle.manifest["source"]["origin"])
    if name not in zoo.names() or not zoo.describe(name).builder:
        raise UserError(f"'{name}' is no network of the zoo that torch builds", where="--against",
                        fix="edgepipe models lists them")  # fmt: skip
    dtype = torch.float16 if case.bundle.recipe.format == "fp16" else torch.float32
    captured = _Captured(zoo.describe(name), case, dtype)
    short = str(dtype).rpartition(".")[2]
    label = f"PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, {short}"
    return [Engine(label, timed(captured.infer), captured.outputs)]


class _Captured:
    """A network on the GPU as a CUDA graph, and the memory that it reads and writes."""

    def __init__(self, entry: zoo.ZooEntry, case: Case, dtype: Any) -> None:
        import torch

        from edgepipe.zoo import weights

        torch.backends.cudnn.benchmark = True
        module = weights.built(entry).eval().to("cuda", dtype, memory_format=torch.channels_last)
        self.names = [spec.name for spec in case.bundle.outputs]
        self.given = [torch.from_numpy(case.inputs[i.name]) for i in entry.inputs]
        self.inputs = [_placed(tensor, dtype) for tensor in self.given]
        self.graph = torch.cuda.CUDAGraph()
        with torch.inference_mode():
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(_WARM):
                    module(*self.inputs)
            torch.cuda.current_stream().wait_stream(beside)
            with torch.cuda.graph(self.graph):
                result = module(*self.inputs)
        self.results = list(result) if isinstance(result, tuple | list) else [result]

    def infer(self) -> list[Any]:
        """One inference; outputs on the CPU, which waits for them."""
        for here, there in zip(self.given, self.inputs, strict=True):
            there.copy_(here)
        self.graph.replay()
        return [result.cpu() for result in self.results]

    def outputs(self) -> Outputs:
        """By the bundle's names."""
        found = [tensor.float().numpy() for tensor in self.infer()]
        return dict(zip(self.names, found, strict=True))


def _placed(tensor: Any, dtype: Any) -> Any:
    import torch

    moved = tensor.to("cuda", dtype if tensor.is_floating_point() else tensor.dtype)
    return moved.contiguous(memory_format=torch.channels_last) if moved.dim() == 4 else moved
