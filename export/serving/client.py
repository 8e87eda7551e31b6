"""client.py of a model repository, copied beside it as it is: what a client of the server does.

    pip install numpy "tritonclient[http]"
    python client.py reconstruct x0.npy x.npy --url localhost:8000        # one request for the whole job
    python client.py reconstruct x0.npy x.npy --loop                      # the loop here, one request a step

x0.npy: float32 [N, C, H, W] in [-1, 1]. The pipelines are nearly always the better choice: one request instead of one
a step, and the server merges requests of different clients into one batch. The loop is for clients that want x in
between. Needs nothing of pdae_fast.
"""

import argparse

import numpy as np

TYPES = {"float32": "FP32", "int64": "INT64"}


class Client:
    """The models called ``name``_encoder, ``name``_conditioning, ... on the server at ``url``."""

    def __init__(self, url="localhost:8000", name="pdae"):
        import tritonclient.http as http

        self.http, self.name = http, name
        self.server = http.InferenceServerClient(url)
        config = self.server.get_model_config(f"{name}_reconstruct")
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self.has_z = parameters["kind"] != "prior"
        self.steps, self.encode_steps = int(parameters["steps"]), int(parameters["encode_steps"])
        self.max_batch = int(config["max_batch_size"])

    def infer(self, model, inputs, outputs):
        """One request: arrays by name in, arrays by name out."""
        tensors = []
        for name, array in inputs.items():
            tensor = self.http.InferInput(name, list(array.shape), TYPES[array.dtype.name])
            tensor.set_data_from_numpy(np.ascontiguousarray(array))
            tensors.append(tensor)
        wanted = [self.http.InferRequestedOutput(name) for name in outputs]
        result = self.server.infer(f"{self.name}_{model}", tensors, outputs=wanted)
        return {name: result.as_numpy(name) for name in outputs}

    # One request each.

    def encode(self, x0):
        """x0 [N, C, H, W] -> z [N, D]"""
        return self.infer("encoder", {"x0": x0}, ["z"])["z"]

    def invert(self, x0):
        """x0 -> {"x_T": [N, C, H, W], "z": [N, D]} (a prior has no z)"""
        return self.infer("invert", {"x0": x0}, ["x_T", "z"] if self.has_z else ["x_T"])

    def decode(self, x_T, z=None):
        """x_T [N, C, H, W] and z [N, D] -> x"""
        return self.infer("decode", {"x_T": x_T} if z is None else {"x_T": x_T, "z": z}, ["x"])["x"]

    def reconstruct(self, x0):
        """x0 -> x"""
        return self.infer("reconstruct", {"x0": x0}, ["x"])["x"]

    # One request a step.

    def loop(self, graph, x, z=None):
        """x after "invert_step" or "decode_step" has run all its steps, in this order: step 0, 1, 2 ..."""
        inputs = (
            {}
            if z is None
            else {"conditioning": self.infer("conditioning", {"z": z}, ["conditioning"])["conditioning"]}
        )
        for i in range(self.encode_steps if graph == "invert_step" else self.steps):
            step = np.array([i], dtype=np.int64)
            x = self.infer(graph, {"x": x, "step": step, **inputs}, ["x_next"])["x_next"]
        return x

    def reconstruct_by_steps(self, x0):
        """x0 -> x as :meth:`reconstruct` computes it."""
        z = self.encode(x0) if self.has_z else None
        return self.loop("decode_step", self.loop("invert_step", x0, z), z)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Send images to a pdae_fast model repository.")
    parser.add_argument("job", choices=["reconstruct", "encode"])
    parser.add_argument("input", help=".npy file with x0, float32 [N, C, H, W] in [-1, 1]")
    parser.add_argument("output", help=".npy file to write")
    parser.add_argument("--url", default="localhost:8000")
    parser.add_argument("--name", default="pdae", help="what the names of the models begin with")
    parser.add_argument("--loop", action="store_true", help="run the loop here, one request a step")
    args = parser.parse_args(argv)
    client = Client(args.url, args.name)
    job = client.reconstruct_by_steps if args.loop and args.job == "reconstruct" else getattr(client, args.job)
    x0 = np.load(args.input).astype(np.float32)
    parts = [job(x0[i : i + client.max_batch]) for i in range(0, len(x0), client.max_batch)]
    np.save(args.output, np.concatenate(parts))


if __name__ == "__main__":
    main()
