"""model.py of the pipelines, copied as it is into the model repository and run by the server's Python backend.

A pipeline runs a whole job by calling the other models of the repository, one call a step:

    reconstruct  x0 -> x        (z and the inferred x_T stay on the server)
    invert       x0 -> z, x_T
    decode       z, x_T -> x

The server's dynamic batcher hands over several requests at once; they start at step 0 together, so they run as one
batch in lock-step, and each gets its rows back. Needs numpy and nothing of pdae_fast.
"""

import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self.task, self.prefix = parameters["task"], parameters["prefix"]
        self.has_z = parameters["kind"] != "prior"
        self.steps, self.encode_steps = int(parameters["steps"]), int(parameters["encode_steps"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]

    def execute(self, requests):
        """One response for every request, in their order."""
        parts = [
            {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            for request in requests
        ]
        try:
            together = {name: np.concatenate([part[name] for part in parts]) for name in self.inputs}
            results = getattr(self, self.task)(**together)
        except Exception as error:
            failure = pb_utils.TritonError(f"{self.task}: {error}")
            return [pb_utils.InferenceResponse(output_tensors=[], error=failure) for _ in requests]
        responses, start = [], 0
        for part in parts:
            rows = slice(start, start + len(part[self.inputs[0]]))
            start = rows.stop
            tensors = [pb_utils.Tensor(name, np.ascontiguousarray(results[name][rows])) for name in self.outputs]
            responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
        return responses

    # The jobs: numpy arrays by name in, numpy arrays by name out.

    def reconstruct(self, x0):
        latents = self.invert(x0)
        return self.decode(latents.pop("x_T"), **latents)

    def invert(self, x0):
        z = self.call("encoder", [pb_utils.Tensor("x0", x0)], "z", on_host=True) if self.has_z else None
        latents = {"z": z.as_numpy()} if self.has_z else {}
        return {"x_T": self.loop("invert_step", x0, self.encode_steps, **latents), **latents}

    def decode(self, x_T, z=None):
        return {"x": self.loop("decode_step", x_T, self.steps, z)}

    def loop(self, graph, x, steps, z=None):
        """x after ``graph`` has run with step 0 ... steps - 1. Where the models keep x on a GPU it stays there."""
        fixed = []
        if z is not None:
            conditioning = self.call("conditioning", [pb_utils.Tensor("z", z)], "conditioning")
            fixed.append(renamed(conditioning, "conditioning"))
        state = pb_utils.Tensor("x", x)
        for i in range(steps):
            step = pb_utils.Tensor("step", np.array([i], dtype=np.int64))
            after = self.call(graph, [state, *fixed, step], "x_next", on_host=i == steps - 1)
            state = renamed(after, "x")
        return state.as_numpy()

    def call(self, graph, inputs, output, on_host=False):
        """One output of one model; ``on_host``: in memory that numpy can read, else wherever the model left it."""
        options = {}
        if on_host:
            options["preferred_memory"] = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)
        request = pb_utils.InferenceRequest(
            model_name=f"{self.prefix}_{graph}", requested_output_names=[output], inputs=inputs, **options
        )
        response = request.exec()
        if response.has_error():
            raise pb_utils.TritonModelException(f"{graph}: {response.error().message()}")
        return pb_utils.get_output_tensor_by_name(response, output)


def renamed(tensor, name):
    """The same memory as an input of another name."""
    if tensor.is_cpu():
        return pb_utils.Tensor(name, tensor.as_numpy())
    return pb_utils.Tensor.from_dlpack(name, tensor.to_dlpack())
