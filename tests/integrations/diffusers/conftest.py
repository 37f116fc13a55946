"""Tiny pipelines, each made once for all tests of a process."""

import diffusers
import pytest
import transformers
from tests.integrations.diffusers import tiny_adapted, tiny_pictures, tiny_pipelines, tiny_sounds, tiny_videos

MAKERS = (
    tiny_pipelines.MAKERS | tiny_pipelines.OTHERS | tiny_pictures.MAKERS | tiny_videos.MAKERS | tiny_sounds.MAKERS | tiny_adapted.MAKERS
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A function from the name of a pipeline to its folder."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    root, made = tmp_path_factory.mktemp("pipelines"), {}

    def of(name):
        if name not in made:
            made[name] = tiny_pipelines.make(name, root, MAKERS)
        return made[name]

    return of
