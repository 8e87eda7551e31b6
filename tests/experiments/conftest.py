"""The model that the commands of a test file run: TINY_FULL, or what the file calls CONFIG."""

import pytest

from helpers import TINY_FULL, tiny_pdae


@pytest.fixture(scope="module")
def model(request):
    return tiny_pdae(getattr(request.module, "CONFIG", TINY_FULL))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("model") / "tiny"
    model.save_pretrained(path)
    return path
