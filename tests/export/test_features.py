"""The exported features against the pipeline's."""

import dataclasses

import numpy as np
import pytest
import torch

from flavours import BASE, FLAVOURS, GOOGLE
from golden_rule import fill, relative
from helpers import TINY, images, tiny_prior
from pdae_fast import DiffAE, DiffAEConfig, Pipeline, UNetConfig, UserError
from pdae_fast.export import manifest as manifests

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from pdae_fast.export.graphs import FeatureGraph  # noqa: E402
from pdae_fast.export.onnx import ExportSettings, export_onnx  # noqa: E402
from pdae_fast.export.runtime import Session  # noqa: E402

DIFFAE = DiffAEConfig(32, latent_dim=16, unet=TINY.unet, encoder_multiplier=(1, 2))
TRACED = {
    "google-classes": ({**GOOGLE, "num_classes": 3}, 2, 1),
    "centred": (FLAVOURS["centred"], None, 0),
    "no-middle": (FLAVOURS["middle-none"], None, 0),
    "middle-scaled": (FLAVOURS["middle-scaled"], None, 4),
}


@pytest.mark.parametrize("changes, label, outputs", TRACED.values(), ids=TRACED)
def test_what_is_traced_computes_the_pipelines_maps(changes, label, outputs):
    prior = tiny_prior(dataclasses.replace(TINY, unet=UNetConfig(**{**BASE, **changes})))
    x, t = images(3, prior.config), [0, 40, 999]
    graph = FeatureGraph(prior, outputs, torch.float32, "group", label)
    with torch.no_grad():
        found = graph(x, torch.tensor(t))
    maps = Pipeline(prior, device="cpu", dtype="float32", label=label, plan="eager").features(x, t, outputs)
    assert len(found) == outputs + 1
    for values, wanted in zip(found, maps.levels, strict=True):
        assert relative(values, wanted) < 1e-5


@pytest.mark.slow
def test_an_export_gives_the_pipelines_maps(tmp_path):
    model, out = fill(DiffAE(DIFFAE)), tmp_path / "out"
    manifest = export_onnx(model, out, ExportSettings(steps=2, max_batch=2, features=2))
    errors = manifest["parity"]["features"]
    assert 0 < errors["relative_error"] < errors["bound"] == 1e-4
    session, x, t = Session(out), images(3, model.config), [0, 40, 999]
    maps = Pipeline(model, device="cpu", dtype="float32").features(x, t, 2)
    for given in (None, session.encode(x.numpy())):
        found = session.features(x.numpy(), t, given)
        for values, wanted in zip(found, maps.levels, strict=True):
            assert relative(torch.from_numpy(values), wanted) < 1e-5
    assert np.allclose(session.features(x.numpy(), 40)[0][1], found[0][1], atol=1e-5)
    for given, said in (({"t": 1000}, "between 0 and 999"), ({"t": [1, 2]}, "t has 2 values")):
        with pytest.raises(UserError, match=said):
            session.features(x.numpy(), **given)


def test_blocks_that_do_not_exist_are_refused(tmp_path):
    prior = tiny_prior()
    with pytest.raises(UserError, match="outputs must be between 0 and 4, not 5"):
        export_onnx(prior, tmp_path / "out", ExportSettings(features=5))
    with pytest.raises(UserError, match="features must be at least 0"):
        ExportSettings(features=-1)
    assert not (tmp_path / "out").exists()


def test_an_export_without_features_says_so(exported_prior):
    session = Session(exported_prior)
    with pytest.raises(UserError, match="without features; export once more with --features"):
        session.features(images(1).numpy())
    described = {**session.manifest, "features": [[4, 8, 8], [4, 16, 16]]}
    inputs, outputs = manifests.feature_signature(described)
    assert [entry["name"] for entry in (*inputs, *outputs)] == ["x", "t", "middle", "output_1"]
